"""The workbench of the algorithms' suite: the tiny policy, a train engine on the CPU, and what a step leaves behind."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar
from unittest import SkipTest

import torch
from torch import Tensor

from rllava_core.algorithms.protocol import Algorithm, Batch, Loss, fed_back
from rllava_core.config import TrainingSection
from rllava_core.engines.config import LocalTrainConfig
from rllava_core.engines.local_train import LocalTrainEngine
from rllava_core.engines.protocol import TrainSetup
from rllava_core.mdp.trajectory import Trajectory
from rllava_core.policy.media import MediaStore
from rllava_core.policy.policy import Policy, PolicyOutput
from rllava_core.specs import Kind
from rllava_core.testing.conformance import Conformance, ConformanceError, require
from rllava_core.testing.rollouts import (
    Script,
    choice_scripts,
    choosing_of,
    conversation_scripts,
    demonstrate,
    pack,
    play,
    text_scripts,
    tiny_policy,
    with_scores,
)
from rllava_core.training.seeds import seed_everything

CHOICES = ("a", "bc", "d")
"""What every turn offers to an algorithm that has an output for each choice."""


PATIENCE = 2000
"""Iterations, of a few turns each, in which an algorithm may collect experience before it yields a batch."""


@dataclass(frozen=True)
class Update:
    """One optimizer step: what was learnt from, what was reported, and the gradient of every weight by name."""

    batch: Batch
    metrics: dict[str, float]
    gradients: dict[str, Tensor]


@functools.cache  # for most checks the same
def _played(scripts: tuple[Script, ...], group_size: int) -> list[Trajectory]:
    return play(tiny_policy(), scripts, group_size)


class AlgorithmSuite(Conformance):
    """Makes policies, engines, trajectories and updates; a subclass may make other ones."""

    kind: ClassVar[Kind] = "algorithm"
    needs: frozenset[str] = frozenset()
    groups: int = 3
    learns: bool = True
    learning_rate: float = 1e-2
    learning_steps: int = 40

    def policy(self, algorithm: Algorithm, seed: int = 0) -> Policy:
        """The policy that the loop would make: with the heads that the algorithm declares."""
        sized = {
            name: replace(head, size=len(CHOICES)) if head.size == "choices" else head
            for name, head in algorithm.heads.items()
        }
        return tiny_policy(sized, seed)

    def engine(self, algorithm: Algorithm, policy: Policy | None = None, **training: Any) -> LocalTrainEngine:
        """A train engine on the CPU without a gradient limit, so that gradients can be compared.

        Copies are other random policies, so that the divergence from a reference is not zero.
        """
        policy = self.policy(algorithm) if policy is None else policy
        section = TrainingSection(steps=1, **{"max_grad_norm": None, **training})
        copies = {name: self.policy(algorithm, seed) for seed, name in enumerate(algorithm.copies, start=1)}
        setup = TrainSetup(policy, copies, MediaStore(policy.adapter), section)
        return LocalTrainEngine(LocalTrainConfig(device="cpu"), setup)

    def trajectories(self, algorithm: Algorithm, scripts: Sequence[Script] | None = None) -> list[Trajectory]:
        """What `prepare` is given: groups that the initial policy plays, or demonstrations, of these scripts."""
        scripts = self.usual_scripts() if scripts is None else scripts
        if any(head.size == "choices" for head in algorithm.heads.values()):
            scripts = choosing_of(scripts, CHOICES)
        if algorithm.experience == "demonstrations":
            return demonstrate(tiny_policy().adapter, scripts)
        return copy.deepcopy(_played(tuple(scripts), algorithm.group_size))

    def update(
        self, algorithm: Algorithm, engine: LocalTrainEngine, trajectories: Sequence[Trajectory], rate: float = 1e-3
    ) -> list[Update]:
        """One iteration of the loop, from the same random state every time. Raises ConformanceError."""
        seed_everything(0)
        updates = []
        steps: list[dict[str, float]] = []
        try:
            for batch in self.batches(algorithm, trajectories, engine, steps):
                metrics = engine.step(batch, algorithm.loss, rate)
                steps.append(metrics)
                updates.append(Update(batch, metrics, gradients_of(engine.policy)))
        except Exception as error:
            raise ConformanceError(
                f"an update on ordinary trajectories raised {type(error).__name__}: {error}"
            ) from error
        require(updates, "prepare() yielded no batch, so training would do nothing")
        return updates

    def batches(
        self,
        algorithm: Algorithm,
        trajectories: Sequence[Trajectory],
        engine: LocalTrainEngine,
        steps: Sequence[Mapping[str, float]] | None = None,
    ) -> Iterator[Batch]:
        """Those of the first iteration that yields any: an algorithm may collect experience before it learns.

        steps: where the caller puts the metrics of each step, which `prepare` is then sent.
        """
        for _ in range(PATIENCE):
            prepared = algorithm.prepare(trajectories, engine)
            found = False
            for batch in prepared if steps is None else fed_back(prepared, steps):
                found = True
                yield batch
            if found:
                return

    def required(self) -> frozenset[str]:
        """The capabilities that the algorithm needs."""
        return self.find().spec.needs if self.component else self.needs

    def usual_scripts(self) -> list[Script]:
        """What most checks play: a text, choices and several turns, or choices alone."""
        if "choices" in self.required():
            scripts = [*choice_scripts()[1:2], *conversation_scripts(choices=True), *choice_scripts()]
        else:
            scripts = [*text_scripts()[:1], *conversation_scripts()[:1], *choice_scripts(), *text_scripts()[1:]]
        return scripts[: self.groups]

    def updates(self, algorithm: Algorithm) -> list[Update]:
        """One iteration on an engine of its own."""
        return self.update(algorithm, self.engine(algorithm), self.trajectories(algorithm))

    def losses(self, algorithm: Algorithm) -> list[Loss]:
        """Of the first batch, whole."""
        engine = self.engine(algorithm)
        seed_everything(0)
        found = []
        for batch in self.batches(algorithm, self.trajectories(algorithm), engine):
            output: PolicyOutput = engine.policy(pack(engine.policy, batch.trajectories))
            found.append(algorithm.loss(batch.to(engine.policy.device), output))
            break
        require(found, "prepare() yielded no batch, so training would do nothing")
        return found

    def require_sound(
        self, scripts: Sequence[Script] | None = None, scores: Sequence[float] = (), *, text: bool = False
    ) -> None:
        """An update whose every number is finite."""
        if text and "choices" in self.required():
            raise SkipTest("the algorithm needs choices")
        algorithm = self.create()
        trajectories = self.trajectories(algorithm, scripts)
        if scores:
            trajectories = with_scores(trajectories, scores)
        for update in self.update(algorithm, self.engine(algorithm, micro_batch_tokens=100), trajectories):
            for name, value in update.metrics.items():
                require(math.isfinite(value), f"metric {name!r} became {value} with returns {_returns(trajectories)}")
            for name, column in update.batch.columns.items():
                require(
                    torch.isfinite(column).all(),
                    f"column {name!r} is not finite with returns {_returns(trajectories)}: is something divided by a "
                    "standard deviation or a count that can be zero?",
                )


def gradients_of(policy: Policy) -> dict[str, Tensor]:
    """What the last step has left."""
    return {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()
        for name, parameter in policy.named_parameters()
    }


def leaves_of(output: PolicyOutput) -> PolicyOutput:
    """The same numbers, cut from the policy, so that a loss leaves its gradient on them."""
    return PolicyOutput(
        output.logprobs.detach().requires_grad_(),
        output.entropies.detach().requires_grad_(),
        {name: values.detach().requires_grad_() for name, values in output.heads.items()},
    )


def _returns(trajectories: Sequence[Trajectory]) -> str:
    values = [trajectory.episode_return for trajectory in trajectories]
    return ", ".join(f"{value:g}" for value in values[:4]) + ("…" if len(values) > 4 else "")
