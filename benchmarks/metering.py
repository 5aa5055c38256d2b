"""The engines `local`, which say how long a step takes, how much memory and how many operations: a plugin."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from rllava_core import ComponentSpec, PluginInfo, hookimpl
from rllava_core.algorithms.protocol import Batch, LossFunction
from rllava_core.engines.config import LocalRolloutConfig, LocalTrainConfig
from rllava_core.engines.local_rollout import LocalRolloutEngine
from rllava_core.engines.local_train import LocalTrainEngine
from rllava_core.engines.protocol import RolloutSetup, TrainSetup
from rllava_core.engines.updates import Update
from rllava_core.mdp.trajectory import ActionSegment
from rllava_core.policy.behaviour import Behaviour
from rllava_core.policy.sampling import Request


class Meter:
    """Peaks of memory by phase: bytes that torch reserved and allocated on the GPU, and resident ones of the process.

    `lap` books what happened since the last one under a name.
    """

    def __init__(self) -> None:
        self.peaks: dict[str, dict[str, int]] = {}
        self.optimizer_seconds = 0.0
        self.engine: MeteredTrain | None = None

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """What is done within; what was done before was something else: loading, or the image probe."""
        self.lap("other")
        try:
            yield
            synchronize()  # so that the phase's seconds are its own
        finally:
            self.lap(name)

    def lap(self, name: str) -> None:
        found = {"host": _resident("VmHWM")}
        try:
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak is the present size again
        except OSError:
            name = "all"  # it cannot be told when it was
        if torch.cuda.is_available():
            found |= {"reserved": torch.cuda.max_memory_reserved(), "allocated": torch.cuda.max_memory_allocated()}
            torch.cuda.reset_peak_memory_stats()
        before = self.peaks.setdefault(name, {})
        self.peaks[name] = {key: max(value, before.get(key, 0)) for key, value in found.items()}


METER = Meter()


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _resident(name: str) -> int:
    """Bytes, from Linux's account of this process."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise SystemExit(f"no {name} in /proc/self/status: memory is measured on Linux only")


class TimedUpdate:
    """An update whose last part, after the backward passes, is timed."""

    def __init__(self, update: Update) -> None:
        self._update = update

    def begin(self, backward_passes: int, learning_rate: float) -> None:
        self._update.begin(backward_passes, learning_rate)

    def finish(self) -> Tensor:
        synchronize()
        began = time.perf_counter()
        norm = self._update.finish()
        synchronize()
        METER.optimizer_seconds = time.perf_counter() - began
        return norm

    def state_dict(self) -> dict[str, Any]:
        return self._update.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._update.load_state_dict(state)


class MeteredTrain(LocalTrainEngine):
    """The engine `local`, which says what a step takes."""

    def __init__(self, config: LocalTrainConfig, setup: TrainSetup) -> None:
        super().__init__(config, setup)
        self._update = TimedUpdate(self._update)
        self._last: tuple[Batch, LossFunction, float] | None = None
        METER.engine = self

    def step(self, batch: Batch, loss: LossFunction, learning_rate: float) -> dict[str, float]:
        self._last = batch, loss, learning_rate
        with METER.phase("update"):
            return super().step(batch, loss, learning_rate)

    def parameters(self) -> dict[str, int]:
        weights = list(self.policy.parameters())
        trained = sum(weight.numel() for weight in weights if weight.requires_grad)
        return {"parameters": sum(weight.numel() for weight in weights), "trained": trained}

    def flops(self) -> dict[str, int | None]:
        """Of an update: as done, and as it would be for sequences one by one, nothing computed again.

        Done anew, for to count costs time and memory; the steps that it takes are nobody's loss, for the run is over.
        """
        assert self._last is not None
        batch, loss, rate = self._last
        done = self._counted(batch, loss, rate)
        self._layout = {"packed": True, "shared": False}
        self.policy.recompute(False)
        [first, *_] = batch.split(1, shared=False)
        one = self._counted(first, loss, rate)
        return {"done": done, "unshared": None if one is None else one * len(batch.trajectories)}

    def _counted(self, batch: Batch, loss: LossFunction, rate: float) -> int | None:
        """None where memory does not suffice, which must not cost what was measured."""
        try:
            with FlopCounterMode(display=False) as counter:
                super().step(batch, loss, rate)
        except torch.OutOfMemoryError:
            return None
        return int(counter.get_total_flops())


class MeteredRollout(LocalRolloutEngine):
    """The engine `local`, which says what sampling takes."""

    def __init__(self, config: LocalRolloutConfig, setup: RolloutSetup) -> None:
        super().__init__(config, setup)

    def generate(
        self, requests: Sequence[Request], seed: int | None, behaviour: Behaviour | None = None
    ) -> list[list[ActionSegment]]:
        # Evaluations are greedy.
        with METER.phase("evaluation" if seed is None else "rollout"):
            return super().generate(requests, seed, behaviour)


@hookimpl
def rllava_plugin_info() -> PluginInfo:
    return PluginInfo(summary="The local engines, measured.")


@hookimpl
def rllava_engines() -> list[ComponentSpec]:
    return [
        ComponentSpec(
            name="metered",
            target="metering:MeteredTrain",
            config="rllava_core.engines.config:LocalTrainConfig",
            summary="`local`, measured",
            provides=frozenset({"train"}),
        ),
        ComponentSpec(
            name="metered",
            target="metering:MeteredRollout",
            config="rllava_core.engines.config:LocalRolloutConfig",
            summary="`local`, measured",
            provides=frozenset({"rollout", "logprobs", "action_values"}),
        ),
    ]
