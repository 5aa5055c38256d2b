"""The contract of engines: one trains the policy, one samples from it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

from rllava_core.algorithms.protocol import Batch, LossFunction
from rllava_core.config import TrainingSection
from rllava_core.mdp.trajectory import ActionSegment, Trajectory
from rllava_core.policy.media import MediaStore
from rllava_core.policy.policy import Policy, PolicyOutput
from rllava_core.policy.sampling import Request


@dataclass(frozen=True)
class TrainSetup:
    """What a train engine is given, beside its config.

    policy: on the CPU; the engine moves and wraps it.
    reference: a frozen copy of the policy that training began with, where the algorithm uses one.
    """

    policy: Policy
    reference: Policy | None
    media: MediaStore
    training: TrainingSection


class TrainEngine(Protocol):
    """Computes gradients and changes weights. The target of an `engine` component that provides `train`, called with
    its config and a `TrainSetup`.

    policy: the policy itself, not wrapped, for sampling in this process and for saving.
    """

    policy: Policy

    def step(self, batch: Batch, loss: LossFunction, learning_rate: float) -> dict[str, float]:
        """One optimizer step on the sum of the losses of the batch's micro-batches. Returns summed metrics.

        Raises TrainingError, with weights unchanged, if a loss or the gradient is not finite.
        """
        ...

    def evaluate(self, trajectories: Sequence[Trajectory]) -> PolicyOutput:
        """The policy on all decisions, without gradients, on the CPU."""
        ...

    def evaluate_reference(self, trajectories: Sequence[Trajectory]) -> PolicyOutput:
        """The reference policy on all decisions."""
        ...

    def autocast(self) -> AbstractContextManager[Any]:
        """The precision of forward passes, for an engine that samples from the same weights."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """What resuming needs beside the weights: the optimizer's state."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        ...


@dataclass(frozen=True)
class RolloutSetup:
    """What a rollout engine is given, beside its config."""

    policy: Policy
    media: MediaStore
    autocast: Callable[[], AbstractContextManager[Any]]


class RolloutEngine(Protocol):
    """Samples actions. The target of an `engine` component that provides `rollout`, called with its config and a
    `RolloutSetup`."""

    def generate(self, requests: Sequence[Request], seed: int | None) -> list[list[ActionSegment]]:
        """`count` actions for each request, in order; the same seed gives the same actions, None the greedy ones."""
        ...

    def sync(self, policy: Policy) -> None:
        """Sample from these weights from now on."""
        ...
