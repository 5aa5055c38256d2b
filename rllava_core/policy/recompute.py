"""Activation checkpointing: layers keep their input, and are computed again in the backward pass (arXiv:1604.06174)."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from rllava_core.errors import ConfigError


class Recomputed:
    """A context in which the layers of models are computed again in backward, if gradients are wanted.

    transformers does that to layers in training mode alone, and drops the cache that they are given: so it is on for
    passes without a cache only. Nothing within the layers is in training mode: there is no dropout.
    """

    def __init__(self, models: Sequence[PreTrainedModel]) -> None:
        self._layers: list[GradientCheckpointingLayer] = []
        for model in models:
            if not model.supports_gradient_checkpointing:
                raise ConfigError(
                    f"engine.train.checkpoint_activations: a {type(model).__name__} cannot compute its layers again: "
                    "set it to false"
                )
            # The name that transformers had for it until 5.20 or so.
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable({"use_reentrant": False})
            self._layers += [layer for layer in model.modules() if isinstance(layer, GradientCheckpointingLayer)]

    def __enter__(self) -> None:
        for layer in self._layers:
            layer.training = True

    def __exit__(self, *_: object) -> None:
        for layer in self._layers:
            layer.training = False
