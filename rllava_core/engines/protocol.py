"""The contract of engines: one trains the policy, one samples from it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

from rllava_core.algorithms.protocol import Batch, LossFunction
from rllava_core.config import TrainingSection
from rllava_core.engines.world import World
from rllava_core.mdp.trajectory import ActionSegment, Trajectory
from rllava_core.policy.behaviour import Behaviour
from rllava_core.policy.media import MediaStore
from rllava_core.policy.policy import Policy, PolicyOutput
from rllava_core.policy.sampling import Request


@dataclass(frozen=True)
class TrainSetup:
    """What a train engine is given, beside its config.

    policy: on the CPU; the engine moves and wraps it.
    copies: by name, the frozen copies that the algorithm asked for, each equal to the policy that training began with.
    """

    policy: Policy
    copies: Mapping[str, Policy]
    media: MediaStore
    training: TrainingSection


class TrainEngine(Protocol):
    """Computes gradients and changes weights. The target of an `engine` component that provides `train`, called with
    its config and a `TrainSetup`.

    policy: the policy itself, not wrapped, for sampling in this process and for saving.
    world: the processes that compute a step together; `Alone` for an engine that knows of none. All of them call every
        method below with the same arguments, and get the same results.
    layout: how trajectories are laid out in batches, for `manifest.json`. The local engine's words are `shared`
        (prompts are read once, answers in rows of several behind them), `rows` (each answer in a row of its own, for a
        model that takes no trees), `packed` (a prompt and its answers are one row) and `unshared` (every trajectory
        whole).

    An engine may also have a method `close()`, which is called when the run is over.
    """

    policy: Policy
    world: World
    layout: str

    def step(self, batch: Batch, loss: LossFunction, learning_rate: float) -> dict[str, float]:
        """One optimizer step on the sum of the losses of the batch's micro-batches. Returns summed metrics.

        Raises TrainingError, with weights unchanged, if a loss or the gradient is not finite.
        """
        ...

    def evaluate(self, trajectories: Sequence[Trajectory], copy: str | None = None) -> PolicyOutput:
        """The policy, or one of the copies, on all decisions and in the states that truncated trajectories were left
        in, without gradients, on the CPU."""
        ...

    def update_copy(self, copy: str, rate: float = 1.0) -> None:
        """Move a copy towards the policy: θ' ← (1 − rate)·θ' + rate·θ."""
        ...

    def autocast(self) -> AbstractContextManager[Any]:
        """The precision of forward passes, for an engine that samples from the same weights."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """What resuming needs beside the policy's weights: the optimizer's state, and the copies that were updated."""
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


@dataclass(frozen=True)
class AnswerSetup:
    """What a rollout engine is given, beside its config, that answers by a model of its own (it provides `own_model`).

    temperature: of the run's policy, for actions that are drawn.
    """

    temperature: float


class RolloutEngine(Protocol):
    """Samples actions. The target of an `engine` component that provides `rollout`, called with its config and a
    `RolloutSetup`.

    One that provides `own_model` is called with an `AnswerSetup` instead. Weights are never loaded then; contexts have
    messages and no tokens, and actions a text and, for free text, no tokens and no log-probs. An answer that is none of
    the choices offered is an action without a choice that has not `ended`.

    An engine may also have a method `report() -> Mapping[str, float]`, which is asked once a step and once an
    evaluation for what else there is to say since it was last asked; reported as `engine/KEY`. And `close()`, which is
    called when the run is over.

    One whose config is an `Overlapping` (`rllava_core.engines.config`) can sample while the policy is trained: with
    `async: 1`, `generate` and `forget` may be called in another thread meanwhile, and `sync` never while they are.
    """

    def generate(
        self, requests: Sequence[Request], seed: int | None, behaviour: Behaviour | None = None
    ) -> list[list[ActionSegment]]:
        """`count` actions for each request, in order; the same seed gives the same actions, None the greedy ones.

        Called once a turn with the requests of all episodes that are under way. An engine may keep what it has read:
        the segments of a context that continues an earlier one are the same objects.

        behaviour: how to act; None: by the policy's own distribution. An engine that can also act by the values of
            heads says so in its spec: it provides `action_values`.
        """
        ...

    def forget(self) -> None:
        """The episodes are over: drop what was kept of their contexts."""
        ...

    def sync(self, policy: Policy) -> None:
        """Sample from these weights from now on, and keep nothing that older ones have read."""
        ...


def close(engine: TrainEngine | RolloutEngine) -> None:
    """What an engine's optional `close()` does; nothing if it has none."""
    end = getattr(engine, "close", None)
    if end is not None:
        end()
