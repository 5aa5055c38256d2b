"""What runs within vLLM: how its workers take the trainer's weights, by the extension point that it has for that.

vLLM finds `register` by the entry point `vllm.general_plugins` in every process of its own, and makes a `Receiver`
where its `weight_transfer_config` names the backend `rllava`. It is given the weights themselves where the trainer is
in the same process, and otherwise bytes in the form of safetensors: never a pickle.
"""

from __future__ import annotations

import base64
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

BACKEND = "rllava"


def register() -> None:
    """Tell vLLM of the backend; again does no harm."""
    from vllm.distributed.weight_transfer import WeightTransferEngineFactory

    try:
        WeightTransferEngineFactory.register_engine(BACKEND, "rllava_vllm.receiver", "Receiver")
    except ValueError as error:
        if "already registered" not in str(error):
            raise


@dataclass
class Opening:
    """What is agreed on before the first weights: nothing."""


@dataclass
class Chunk:
    """Some of the weights, by their names in a checkpoint: `weights` in the same process, else `safetensors`, encoded
    in base 64."""

    weights: list[tuple[str, Any]] | None = None
    safetensors: str | None = None

    def pairs(self) -> list[tuple[str, Tensor]]:
        """Names and values. Raises ValueError unless there is exactly one of the two."""
        if (self.weights is None) == (self.safetensors is None):
            raise ValueError("a chunk holds either weights or safetensors")
        if self.weights is not None:
            return self.weights
        from safetensors.torch import load

        assert self.safetensors is not None
        return list(load(base64.b64decode(self.safetensors, validate=True)).items())
