"""The workbench of the engines' suite: which role is checked, the tiny policy, batches and requests."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, ClassVar
from unittest import SkipTest

import torch
from torch import Tensor

from rllava_core.algorithms.protocol import Batch, Loss
from rllava_core.config import TrainingSection
from rllava_core.engines.protocol import AnswerSetup, RolloutEngine, RolloutSetup, TrainEngine, TrainSetup
from rllava_core.errors import ModelError
from rllava_core.mdp.trajectory import Segment, Trajectory
from rllava_core.policy.media import MediaStore
from rllava_core.policy.policy import Head, Policy, PolicyOutput
from rllava_core.policy.sampling import Request
from rllava_core.specs import Kind
from rllava_core.testing.conformance import Conformance, UnsuitedError, require
from rllava_core.testing.rollouts import (
    Shown,
    choice_scripts,
    conversation_scripts,
    final_heads,
    pack,
    picture,
    play,
    request,
    text_scripts,
    tiny_policy,
)
from rllava_core.training.storage import load_tree, save_tree

ENDS = tuple(range(24))
"""Bytes that end a turn in the engines' checks, so that some answers end and some are cut."""

FORBIDDEN = tuple(range(128, 192))
"""Bytes that may not be sampled in the engines' checks, so that an engine that samples them does so at once."""


class EngineSuite(Conformance):
    """Makes engines of either role on tiny policies."""

    kind: ClassVar[Kind] = "engine"
    logprobs: bool = True
    action_values: bool = True
    own_model: bool = False
    tolerance: float = 1e-4

    def create(self, setup: TrainSetup | RolloutSetup | AnswerSetup | None = None) -> Any:
        """A new engine of the component on a setup, or on a tiny policy of its own."""
        if setup is None and self.role != "train" and self._has_own_model():
            setup = self.answer_setup()
        elif setup is None:
            policy = self.policy()
            setup = self.train_setup(policy) if self.role == "train" else self.rollout_setup(policy)
        return self.target()(self.config(), setup)

    def policy(self, seed: int = 0, heads: Mapping[str, Head] | None = None) -> Policy:
        """Random weights from the seed; a turn ends, and a token is forbidden, more often than usual.

        An engine that can take no tiny policy is checked on another, which its author makes here: always the same for
        the same seed, at a temperature other than 1, with `ENDS` and `FORBIDDEN` beside its family's own tokens, and
        in float32.
        """
        return tiny_policy(heads, seed, 2.0, end_of_turn=ENDS, forbidden_tokens=FORBIDDEN)

    def train_setup(self, policy: Policy, copies: Mapping[str, Policy] | None = None, **training: Any) -> TrainSetup:
        """Without a gradient limit, unless `training` has one."""
        section = TrainingSection(steps=1, **{"max_grad_norm": None, **training})
        return TrainSetup(policy, copies or {}, MediaStore(policy.adapter), section)

    def rollout_setup(self, policy: Policy) -> RolloutSetup:
        """In the precision of the weights."""
        return RolloutSetup(policy, MediaStore(policy.adapter), nullcontext)

    def answer_setup(self) -> AnswerSetup:
        """For an engine that answers by a model of its own."""
        return AnswerSetup(temperature=1.0)

    def trainer(
        self, policy: Policy | None = None, copies: Mapping[str, Policy] | None = None, **training: Any
    ) -> TrainEngine:
        """A train engine. Raises SkipTest if the component does not train."""
        self._require_role("train")
        with _suited():
            engine: TrainEngine = self.create(self.train_setup(policy or self.policy(), copies, **training))
        return engine

    def sampler(self, policy: Policy | None = None) -> RolloutEngine:
        """A rollout engine. Raises SkipTest if the component does not sample, or not from the policy."""
        self._require_role("rollout")
        if self._has_own_model():
            raise SkipTest("the engine answers by a model of its own")
        with _suited():
            engine: RolloutEngine = self.create(self.rollout_setup(policy or self.policy()))
        return engine

    def trajectories(self) -> list[Trajectory]:
        """Text, choices, several turns, several images and none."""
        return play(self.policy(), [*text_scripts(), *choice_scripts(), *conversation_scripts()], 2)

    def requests(self, counts: Sequence[int] = (3, 1, 4, 2, 1)) -> list[Request]:
        """Texts and choices by turns, with an image, several and none, and a later turn of a conversation."""
        adapter = self.policy().adapter
        media = MediaStore(adapter)
        [earlier] = play(self.policy(), [text_scripts()[0]])
        turns = [
            Shown((picture(), "Colour?"), max_tokens=5),
            Shown(("Is ", picture(8, 24, 1), " like ", picture(12, 8, 2), "?"), ("yes", "no!", "hmm")),
            Shown(("Two and two?",), max_tokens=2),
            Shown(("Up?",), ("y", "n")),
            Shown((picture(12, 8, 3), "And now?"), max_tokens=7),
        ]
        last = earlier.turns[-1]
        history: list[tuple[Segment, ...]] = [(), (), (), (), (*last.context, last.action)]
        return [
            request(adapter, media, turn, count, before)
            for turn, count, before in zip(turns, counts, history, strict=True)
        ]

    def _require_role(self, role: str) -> None:
        if self.component:
            provided = role in self.find().spec.provides and self.role in (None, role)
        else:
            provided = self.role == role
        if not provided:
            raise SkipTest(f"the component does not provide {role!r}")

    def _returns_logprobs(self) -> bool:
        return "logprobs" in self.find().spec.provides if self.component else self.logprobs

    def _has_own_model(self) -> bool:
        return "own_model" in self.find().spec.provides if self.component else self.own_model

    def _acts_by_values(self) -> bool:
        return "action_values" in self.find().spec.provides if self.component else self.action_values


@contextmanager
def _suited() -> Iterator[None]:
    """An engine that can take no tiny policy says so by a ModelError, and is not wrong for that."""
    try:
        yield
    except ModelError as error:
        raise UnsuitedError(f"{error}; override `policy` of the suite with one of a model that it can take") from error


def weighted(trajectories: Sequence[Trajectory]) -> Batch:
    """A batch whose decisions all weigh the same."""
    decisions = sum(trajectory.decisions for trajectory in trajectories)
    return Batch(tuple(trajectories), {"weights": torch.full((decisions,), 1.0 / decisions)})


def imitation(batch: Batch, output: PolicyOutput) -> Loss:
    """Raises the log-prob of every decision, and moves every head towards 1; counts the decisions."""
    per_decision = -output.logprobs
    for values in output.heads.values():
        per_decision = per_decision + (values - 1).square().sum(-1)
    total = (batch.weights * per_decision).sum()
    decisions = total.new_tensor(len(output.logprobs))
    return Loss(total, {"conformance/loss": total.detach(), "conformance/decisions": decisions})


def weights_of(policy: Policy) -> dict[str, Tensor]:
    """A copy on the CPU."""
    return {name: values.detach().cpu().clone() for name, values in policy.state_dict().items()}


def moved(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> float:
    """Norm of the difference of two sets of weights."""
    squares = [float((after[name].double() - values.double()).square().sum()) for name, values in before.items()]
    return math.sqrt(sum(squares))


def same_weights(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> bool:
    """Bitwise."""
    return all(torch.equal(values, second[name]) for name, values in first.items())


def through_a_file(state: Any) -> Any:
    """What is read of a state that was saved. Raises ConformanceError if it cannot be saved."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "engine"
        try:
            save_tree(state, path)
        except Exception as error:  # noqa: BLE001 - whatever prevents it is the finding
            require(False, f"state_dict() cannot be saved: {error}")
        return load_tree(path)


def recomputed(policy: Policy, trajectories: Sequence[Trajectory]) -> PolicyOutput:
    """What the policy itself says, on the CPU."""
    with torch.no_grad():
        output: PolicyOutput = policy(pack(policy, trajectories))
        final = final_heads(policy, trajectories)
    return PolicyOutput(
        output.logprobs.cpu(),
        output.entropies.cpu(),
        {name: values.cpu() for name, values in output.heads.items()},
        {name: values.cpu() for name, values in final.items()},
    )
