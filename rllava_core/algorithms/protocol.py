"""The contract of an algorithm: what it needs, what it prepares, what it minimises.

An iteration of the loop is: sample trajectories, `prepare` them into batches, and for each batch one optimizer step
on `loss`. Everything that varies between algorithms is on this page:

- A critic-free algorithm prepares advantages and a clipped loss.
- An actor-critic declares a head `value`, evaluates it in `prepare`, also in the states that truncated episodes were
  left in, adds its loss, and yields several epochs.
- A value-based one declares a head of action values and acts by it, `prepare` puts trajectories into its replay and
  yields batches drawn from it, with targets from a frozen copy of the policy that it updates now and then.
- A supervised one sets `experience` to demonstrations: trajectories made of the examples' own answers.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from rllava_core.errors import TrainingError
from rllava_core.mdp.trajectory import Parts, Trajectory
from rllava_core.policy.behaviour import Behaviour
from rllava_core.policy.policy import Head, PolicyOutput


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

    def split(self, tokens: int, *, shared: bool = True) -> Iterator[Batch]:
        """Micro-batches of whole trajectories of at most `tokens` tokens; what is shared in one counts once.

        shared: off where it is read again for every trajectory.
        """
        start = decisions = 0
        taken: list[Trajectory] = []
        count = TokenCount()
        for trajectory in self.trajectories:
            parts = trajectory.parts
            if not count.add(parts, shared=shared, limit=tokens if taken else None):
                yield self._slice(taken, start, start + decisions)
                start, decisions, taken, count = start + decisions, 0, [], TokenCount()
                count.add(parts, shared=shared)
            taken.append(trajectory)
            decisions += trajectory.decisions
        if taken:
            yield self._slice(taken, start, start + decisions)

    def chosen(self, numbers: Sequence[int]) -> Batch:
        """The trajectories of these numbers, in this order."""
        if list(numbers) == list(range(len(self.trajectories))):
            return self
        counts = torch.tensor([item.decisions for item in self.trajectories], dtype=torch.long)
        rows = torch.arange(int(counts.sum())).split(counts.tolist())
        index = torch.cat([rows[number] for number in numbers]) if numbers else torch.zeros(0, dtype=torch.long)
        own = tuple(self.trajectories[number] for number in numbers)
        return Batch(own, {name: column[index] for name, column in self.columns.items()})

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

    def evaluate(self, trajectories: Sequence[Trajectory], copy: str | None = None) -> PolicyOutput:
        """The policy as it is now, or one of the algorithm's frozen copies, on all decisions of the trajectories; the
        heads also in the state that each truncated trajectory was left in (`PolicyOutput.final`)."""
        ...

    def update_copy(self, copy: str, rate: float = 1.0) -> None:
        """Move a frozen copy towards the policy as it is now: θ' ← (1 − rate)·θ' + rate·θ; 1 makes them equal."""
        ...


class Algorithm(Protocol):
    """A learning rule. The target of an `algorithm` component, called with its config.

    experience: what `prepare` is given: sampled episodes, or demonstrations made of the examples' answers.
    group_size: trajectories sampled of each example and seed.
    heads: name and shape of further outputs that the policy must have in the state of each decision.
    copies: names of frozen copies of the policy that the engine keeps, each at first equal to the policy that training
        began with: a reference policy, which stays so, or a target network.
    """

    experience: Literal["rollouts", "demonstrations"]
    group_size: int
    heads: Mapping[str, Head]
    copies: Sequence[str]

    def behaviour(self) -> Behaviour:
        """How the policy acts in the episodes of the next iteration; asked before each."""
        ...

    def prepare(self, trajectories: Sequence[Trajectory], policy: PolicyAccess) -> Iterable[Batch]:
        """Batches, one an optimizer step. Consumed one by one with the steps between.

        A generator may look at what the last step did, for the metrics of the step are what its `yield` returns, and
        stop early. It may also yield nothing, while experience is still being collected.
        """
        ...

    def loss(self, batch: Batch, output: PolicyOutput) -> Loss:
        """The loss of a micro-batch, from the policy's output on it."""
        ...

    def report(self) -> Mapping[str, float]:
        """Further metrics of the iteration that `prepare` was called for, by name; asked after its last step."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """What is kept between iterations, as tensors, numbers, strings, lists and dicts of these."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        ...


def fed_back(batches: Iterable[Batch], updates: Sequence[Mapping[str, float]]) -> Iterator[Batch]:
    """The batches; a generator is sent the metrics of the step on the batch before."""
    if not isinstance(batches, Generator):
        yield from batches
        return
    with closing(batches):
        try:
            yield next(batches)
            while True:
                yield batches.send(updates[-1])
        except StopIteration:
            return


class TokenCount:
    """How many tokens the trajectories of a micro-batch are, where those that are read once for several count once."""

    def __init__(self) -> None:
        self.total = 0
        self._begun: set[object] = set()

    def add(self, parts: Parts, *, shared: bool, limit: int | None = None) -> bool:
        """Whether there is room for this trajectory, too, where no more than `limit` tokens are allowed."""
        more = parts.own + sum(tokens for key, tokens in parts.begun.items() if key not in self._begun)
        if limit is not None and self.total + more > limit:
            return False
        self.total += more
        if shared:
            self._begun.update(parts.begun)
        return True
