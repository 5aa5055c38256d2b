"""The contract of an algorithm: what it needs, what it prepares, what it minimises.

An iteration of the loop is: sample trajectories, `prepare` them into batches, and for each batch one optimizer step
on `loss`. Everything that varies between algorithms is on this page:

- A critic-free algorithm prepares advantages and a clipped loss.
- An actor-critic declares a head `value`, evaluates it in `prepare`, adds its loss, and yields several epochs.
- A value-based one declares a head of action values, `prepare` puts trajectories into its replay and yields batches
  drawn from it, with targets from `policy.evaluate` of its own target weights.
- A supervised one sets `experience` to demonstrations: trajectories made of the examples' own answers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from rllava_core.errors import TrainingError
from rllava_core.mdp.trajectory import Trajectory
from rllava_core.policy.policy import PolicyOutput


@dataclass(frozen=True)
class Batch:
    """What one optimizer step learns from.

    trajectories: in order; the decisions of a batch are theirs, one after another.
    columns: tensors of one row a decision, [D] or [D, …]; read as attributes: `batch.advantages`.

    A batch is split into micro-batches between trajectories, so a loss must be a sum over decisions whose
    normalisation is in its columns (`weights`): then gradients do not depend on the split.
    """

    trajectories: tuple[Trajectory, ...]
    columns: Mapping[str, Tensor]

    def __post_init__(self) -> None:
        decisions = sum(trajectory.decisions for trajectory in self.trajectories)
        for name, column in self.columns.items():
            if column.shape[:1] != (decisions,):
                raise TrainingError(
                    f"column {name!r} of a batch has shape {tuple(column.shape)} for {decisions} decisions"
                )

    def __getattr__(self, name: str) -> Tensor:
        columns: Mapping[str, Tensor] = self.__dict__.get("columns", {})
        try:
            return columns[name]
        except KeyError:
            raise AttributeError(f"the batch has no column {name!r}; it has {', '.join(columns)}") from None

    def to(self, device: torch.device) -> Batch:
        """The same batch with its columns on a device."""
        return Batch(self.trajectories, {name: column.to(device) for name, column in self.columns.items()})

    def split(self, tokens: int) -> Iterator[Batch]:
        """Micro-batches of whole trajectories of at most `tokens` tokens; a prompt shared in one counts once."""
        start = decisions = 0
        taken: list[Trajectory] = []
        spent = 0
        prompts: set[object] = set()
        for trajectory in self.trajectories:
            own = sum(len(segment.tokens) for segment in trajectory.segments[1:])
            prompt = trajectory.prompt
            cost = own + (0 if prompt in prompts else len(prompt.tokens))
            if taken and spent + cost > tokens:
                yield self._slice(taken, start, start + decisions)
                start, decisions, taken, spent, prompts = start + decisions, 0, [], 0, set()
                cost = own + len(prompt.tokens)
            taken.append(trajectory)
            prompts.add(prompt)
            decisions += trajectory.decisions
            spent += cost
        if taken:
            yield self._slice(taken, start, start + decisions)

    def _slice(self, trajectories: Sequence[Trajectory], start: int, end: int) -> Batch:
        return Batch(tuple(trajectories), {name: column[start:end] for name, column in self.columns.items()})


@dataclass(frozen=True)
class Loss:
    """What an algorithm says of a micro-batch.

    total: scalar to minimise; the sum over the micro-batches of a step is the step's loss.
    metrics: scalars that add up over the micro-batches likewise, by name.
    """

    total: Tensor
    metrics: Mapping[str, Tensor]


LossFunction = Callable[[Batch, PolicyOutput], Loss]


class PolicyAccess(Protocol):
    """What `prepare` may ask of the policy. Nothing here has gradients; results are on the CPU."""

    def evaluate(self, trajectories: Sequence[Trajectory]) -> PolicyOutput:
        """The policy as it is now on all decisions of the trajectories."""
        ...

    def evaluate_reference(self, trajectories: Sequence[Trajectory]) -> PolicyOutput:
        """The reference policy: the weights that training began with."""
        ...


class Algorithm(Protocol):
    """A learning rule. The target of an `algorithm` component, called with its config.

    experience: what `prepare` is given: sampled episodes, or demonstrations made of the examples' answers.
    group_size: trajectories sampled of each example and seed.
    uses_reference: whether the loop keeps a copy of the weights that training began with.
    heads: name and size of further outputs that the policy must have in the state of each decision.
    """

    experience: Literal["rollouts", "demonstrations"]
    group_size: int
    uses_reference: bool
    heads: Mapping[str, int]

    def prepare(self, trajectories: Sequence[Trajectory], policy: PolicyAccess) -> Iterable[Batch]:
        """Batches, one an optimizer step. Consumed one by one with the steps between, so that a generator may look
        at what the last step did, and stop early."""
        ...

    def loss(self, batch: Batch, output: PolicyOutput) -> Loss:
        """The loss of a micro-batch, from the policy's output on it."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """What is kept between iterations, as tensors, numbers, strings, lists and dicts of these."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        ...
