"""Which part of a model each weight belongs to, read off the model's own structure."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn
from transformers import PreTrainedModel

from rllava_core.policy.adapter import Part

MERGERS = ("merger", "deepstack_merger_list", "connector", "projector", "multi_modal_projector", "mlp1")
"""Families that keep what translates for the language model inside the vision part name it so."""


def beginnings(model: PreTrainedModel) -> Mapping[str, Part]:
    """Beginnings of the names of parameters, of which the longest that fits decides.

    Vision is what the model itself calls its encoder of images, and language its decoder, its embeddings and its head.
    The rest lies between the two, so it is the connector (a projector, the newline of an image), and so are modules
    inside the vision part that are called one of MERGERS.
    """
    names = {id(module): name for name, module in model.named_modules()}
    found: dict[str, Part] = {"": "connector"}
    speaking = [model.get_decoder(), model.get_input_embeddings(), model.get_output_embeddings()]
    # Without an encoder or a decoder of its own a model gives itself, or what holds everything.
    whole = {id(model), id(model.base_model)}
    for module in speaking:
        if isinstance(module, nn.Module) and id(module) in names and id(module) not in whole:
            found[names[id(module)] + "."] = "language"
    encoder = model.get_encoder(modality="image")
    if isinstance(encoder, nn.Module) and id(encoder) in names and id(encoder) not in whole:
        vision = names[id(encoder)]
        found[vision + "."] = "vision"
        found |= {
            f"{vision}.{name}.": "connector"
            for name, _ in encoder.named_modules()
            if name.rpartition(".")[2] in MERGERS
        }
    return found


def part_of(parameter: str, parts: Mapping[str, Part]) -> Part:
    """The part of the longest beginning that fits."""
    return parts[max((begin for begin in parts if parameter.startswith(begin)), key=len)]
