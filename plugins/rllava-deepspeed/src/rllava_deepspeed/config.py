"""Options of the engine. Imports no torch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from rllava_core.engines.config import Divided, TrainOptions


class DeepSpeedConfig(TrainOptions):
    """`engine: {train: {name: deepspeed, …}}`"""

    stage: Literal[2, 3] = Field(
        default=2,
        description="of ZeRO (arXiv:1910.02054), what is divided by the processes: 2: gradients and the optimizer's "
        "states; 3: weights, too",
    )

    @property
    def divided(self) -> frozenset[Divided]:
        always: frozenset[Divided] = frozenset({"gradients", "states", "masters"})
        return always | {"weights"} if self.stage == 3 else always
