"""What vLLM is told of the model before it is given weights, and weights in pieces that fit a message."""

from __future__ import annotations

import base64
import copy
from collections.abc import Iterable, Iterator
from pathlib import Path

from safetensors.torch import save
from torch import Tensor

from rllava_core.errors import ModelError
from rllava_core.policy.policy import Policy


def describe_model(policy: Policy, directory: Path) -> None:
    """Write the config and the processor of a checkpoint, from which vLLM makes the model, and no weights: those are
    handed over. Raises ModelError for an adapter without a processor of transformers."""
    processor = getattr(policy.adapter, "processor", None)
    if processor is None or not hasattr(processor, "save_pretrained"):
        raise ModelError(
            f"engine.rollout vllm loads models of transformers, and the adapter {type(policy.adapter).__name__} has no "
            "processor of transformers; use engine.rollout: local"
        )
    config = copy.deepcopy(policy.model.config)
    config.architectures = [type(policy.model).__name__]  # else vLLM takes it for a model that embeds
    config.save_pretrained(directory)
    processor.save_pretrained(directory)


def dtype_of(policy: Policy) -> str:
    """The precision of the weights, by vLLM's name for it."""
    weight = policy.adapter.lm_head(policy.model).weight
    assert isinstance(weight, Tensor)
    return str(weight.dtype).removeprefix("torch.")


def trusted(policy: Policy) -> bool:
    """Whether the config allows code that comes with the model."""
    return bool(getattr(getattr(policy.adapter, "config", None), "trust_remote_code", False))


def pieces(weights: Iterable[tuple[str, Tensor]], limit: int) -> Iterator[list[tuple[str, Tensor]]]:
    """Weights in their order, some at a time: `limit` bytes at most, or one that is larger. Only those of one piece are
    held at once."""
    piece: list[tuple[str, Tensor]] = []
    size = 0
    for name, values in weights:
        if piece and size + values.nbytes > limit:
            yield piece
            piece, size = [], 0
        piece.append((name, values))
        size += values.nbytes
    if piece:
        yield piece


def encoded(piece: Iterable[tuple[str, Tensor]]) -> str:
    """As `rllava_vllm.receiving.Chunk` reads it."""
    return base64.b64encode(save({name: values.contiguous().cpu() for name, values in piece})).decode()
