"""What the parts that see make of an image, where they are frozen: once an image, for whoever passes it on."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch

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


def encoder_of(
    policy: Policy, autocast: Callable[[], AbstractContextManager[Any]]
) -> Callable[[Features], Features] | None:
    """What encodes one preprocessed image; None where images are seen anew in every pass.

    Every copy of the policy shares what is frozen, so what one would make of an image, all would. Each image is encoded
    alone, so that what becomes of it depends on nothing beside it, and a run that is resumed finds the same numbers.

    autocast: the context of forward passes.

    The encoder raises ModelError where something that is trained takes part in it, whatever part it is said to be of.
    """
    adapter = encoding_adapter(policy)
    if adapter is None:
        return None

    def encode(features: Features) -> Features:
        media = {name: values.to(policy.device) for name, values in policy.adapter.collate([features]).items()}
        # Gradients are asked for, to see that there are none.
        with torch.inference_mode(False), torch.enable_grad(), autocast():
            found = adapter.encode_images(policy.model, media)
        if any(values.requires_grad for values in found.values()):
            raise ModelError(
                "the model's vision part and connector are frozen, and something that is trained takes part in what "
                "they make of an image: the adapter's `part_of` says that it is of the language model; mend it, or set "
                "model.encoded_bytes=0"
            )
        return {name: values.cpu() for name, values in found.items()}

    return encode
