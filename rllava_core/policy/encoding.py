"""What the parts that see make of an image, where they are frozen: once an image, for whoever passes it on."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from rllava_core.errors import ModelError
from rllava_core.policy.adapter import EncodesImages, Features
from rllava_core.policy.policy import Policy


def encoding_adapter(policy: Policy) -> EncodesImages | None:
    """The policy's adapter, if what its model makes of an image never changes, and can be computed apart."""
    adapter = policy.adapter
    seeing = [
        parameter
        for name, parameter in policy.model.named_parameters()
        if adapter.part_of(name.replace(".base_layer.", ".")) != "language"
    ]
    if not seeing or any(parameter.requires_grad for parameter in seeing):
        return None
    return adapter if isinstance(adapter, EncodesImages) and adapter.encodes_images(policy.model) else None


def encoder_of(policy: Policy, autocast: Callable[[], AbstractContextManager[Any]]) -> Encoder | None:
    """What encodes images; None where they are seen anew in every pass.

    autocast: the context of forward passes.
    """
    adapter = encoding_adapter(policy)
    return None if adapter is None else Encoder(policy, adapter, autocast)


class Encoder:
    """Encodes one preprocessed image.

    Every copy of the policy shares what is frozen, so what one would make of an image, all would. Each image is encoded
    alone, so that what becomes of it depends on nothing beside it, and a run that is resumed finds the same numbers.

    Raises ModelError where a weight that is trained takes part in it, whatever part it is said to be of.
    """

    def __init__(
        self, policy: Policy, adapter: EncodesImages, autocast: Callable[[], AbstractContextManager[Any]]
    ) -> None:
        self._policy = policy
        self._adapter = adapter
        self._autocast = autocast
        self._checked = False

    def __call__(self, features: Features) -> Features:
        policy = self._policy
        media = {name: values.to(policy.device) for name, values in policy.adapter.collate([features]).items()}
        # Of the first image a graph is made, to see that no weight is in it.
        with torch.inference_mode(False), torch.set_grad_enabled(not self._checked), self._autocast():
            found = self._adapter.encode_images(policy.model, media)
        if not self._checked and _reaches_weights(found.values()):
            raise ModelError(
                "the model's vision part and connector are frozen, and something that is trained takes part in what "
                "they make of an image: the adapter's `part_of` says that it is of the language model; mend it, or set "
                "model.encoded_bytes=0"
            )
        self._checked = True
        return {name: values.detach().cpu() for name, values in found.items()}


def _reaches_weights(tensors: Iterable[Tensor]) -> bool:
    """Whether a gradient of these would reach a parameter. (That they want one says less: under low-rank adapters whose
    layers are computed again, transformers lets all that is embedded want one.)"""
    nodes = {values.grad_fn for values in tensors}
    seen: set[object] = {None}
    while nodes:
        if any(isinstance(getattr(node, "variable", None), nn.Parameter) for node in nodes):
            return True
        seen |= nodes
        nodes = {after for node in nodes if node is not None for after, _ in node.next_functions} - seen
    return False
