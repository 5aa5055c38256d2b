"""Healthy algorithms pass the suite, and for every check there is a bad one that it catches."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor

from rllava_core.algorithms.config import PolicyGradientConfig
from rllava_core.algorithms.policy_gradient import PolicyGradient, Rollouts
from rllava_core.algorithms.protocol import Batch, Loss, PolicyAccess
from rllava_core.mdp.trajectory import Trajectory
from rllava_core.policy.behaviour import Behaviour
from rllava_core.policy.policy import Head, PolicyOutput
from rllava_core.testing import AlgorithmConformance, Conformance, ConformanceError, check_algorithm
from rllava_core.testing.conformance import checks_of
from rllava_toy.algorithm import ToyCritic, ToyGradient, ToyImitation
from rllava_toy.config import ToyGradientConfig

CONFIG = PolicyGradientConfig(group_size=4, kl_coefficient=0.01)


class Healthy(PolicyGradient):
    """A value head and a running mean as baselines, and a divergence from the reference: something of everything."""

    heads: ClassVar = {"value": Head(1)}

    def __init__(self, config: PolicyGradientConfig = CONFIG) -> None:
        super().__init__(config)
        self.running = torch.zeros(())

    def advantages(self, rollouts: Rollouts) -> Tensor:
        self.running = 0.9 * self.running + 0.1 * rollouts.returns.mean()
        return rollouts.returns - self.running

    def targets(self, rollouts: Rollouts, policy: PolicyAccess) -> dict[str, Tensor]:
        returns = rollouts.returns.repeat_interleave(rollouts.decisions)
        return {**super().targets(rollouts, policy), "returns": returns}

    def token_loss(self, batch: Batch, output: PolicyOutput) -> Tensor:
        error = (output.heads["value"][:, 0] - batch.returns) ** 2
        return -output.logprobs * batch.advantages + 0.1 * error

    def metrics(self, batch: Batch, output: PolicyOutput) -> dict[str, Tensor]:
        return {"value/error": (output.heads["value"][:, 0] - batch.returns) ** 2}

    def state_dict(self) -> dict[str, Any]:
        return {"running": self.running}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.running = state["running"]


class GroupSizeAsText(Healthy):
    def __init__(self) -> None:
        super().__init__()
        self.group_size: Any = "4"


class UnknownExperience(Healthy):
    experience: Any = "replay"


class HeadsAsAList(Healthy):
    heads: ClassVar[Any] = ["value"]


class HeadsAsNumbers(Healthy):
    heads: ClassVar[Any] = {"value": 1}


class HeadOfNothing(Healthy):
    heads: ClassVar = {"value": Head(0)}


class CopiesAsAText(Healthy):
    def __init__(self) -> None:
        super().__init__()
        self.copies: Any = "reference"


class NoBehaviour(Healthy):
    def behaviour(self) -> Any:
        return None


class ExploresTooMuch(Healthy):
    def behaviour(self) -> Any:
        return Behaviour(epsilon=1.5)


class WithoutGroupSize(Healthy):
    def __init__(self) -> None:
        super().__init__()
        del self.group_size


class HeadThatNobodyReads(Healthy):
    heads: ClassVar = {"value": Head(1), "other": Head(2)}


class CopyThatNobodyReads(Healthy):
    def __init__(self) -> None:
        super().__init__()
        self.copies = ("reference", "target")


class CopyThatNobodyDeclared(Healthy):
    def targets(self, rollouts: Rollouts, policy: PolicyAccess) -> dict[str, Tensor]:
        return {**super().targets(rollouts, policy), "r": policy.evaluate(rollouts.trajectories, "target").logprobs}


class Lazy(Healthy):
    def prepare(self, trajectories: Sequence[Trajectory], policy: PolicyAccess) -> Any:
        return iter(())


class FirstTokenOnly(Healthy):
    """Cuts the answers, where whole turns may be left out."""

    def prepare(self, trajectories: Sequence[Trajectory], policy: PolicyAccess) -> Any:
        return super().prepare([self.cut(item) for item in trajectories], policy)

    def cut(self, item: Trajectory) -> Trajectory:
        [*earlier, last] = item.turns
        if last.action.choice is not None:
            return item
        action = replace(last.action, tokens=last.action.tokens[:1], logprobs=last.action.logprobs[:1])
        return replace(item, turns=(*earlier, replace(last, action=action)))


class EmptyBatches(Healthy):
    def prepare(self, trajectories: Sequence[Trajectory], policy: PolicyAccess) -> Any:
        yield from super().prepare(trajectories, policy)
        yield Batch((), {})


class ColumnsWithGradients(Healthy):
    def targets(self, rollouts: Rollouts, policy: PolicyAccess) -> dict[str, Tensor]:
        return {
            **super().targets(rollouts, policy),
            "free": torch.zeros(len(rollouts.old_logprobs), requires_grad=True),
        }


class ColumnsOfNaN(Healthy):
    def targets(self, rollouts: Rollouts, policy: PolicyAccess) -> dict[str, Tensor]:
        return {**super().targets(rollouts, policy), "odds": rollouts.old_logprobs.log()}


class DetachedLoss(Healthy):
    def loss(self, batch: Batch, output: PolicyOutput) -> Loss:
        result = super().loss(batch, output)
        return Loss(result.total.detach(), result.metrics)


class LossOfEachDecision(Healthy):
    def loss(self, batch: Batch, output: PolicyOutput) -> Loss:
        return Loss(batch.weights * self.token_loss(batch, output), {})


class InfiniteLoss(Healthy):
    def loss(self, batch: Batch, output: PolicyOutput) -> Loss:
        result = super().loss(batch, output)
        return Loss(result.total / 0.0, result.metrics)


class NothingToLearn(Healthy):
    def loss(self, batch: Batch, output: PolicyOutput) -> Loss:
        result = super().loss(batch, output)
        return Loss(result.total * 0, result.metrics)


def reporting(name: str, value: Any = None) -> type[Healthy]:
    """An algorithm with one metric more."""

    class Reporting(Healthy):
        def loss(self, batch: Batch, output: PolicyOutput) -> Loss:
            result = super().loss(batch, output)
            own = result.total.detach() if value is None else value(output)
            return Loss(result.total, {**result.metrics, name: own})

    return Reporting


def telling(name: Any, value: Any) -> type[Healthy]:
    """An algorithm that reports this after its last step."""

    class Telling(Healthy):
        def report(self) -> dict[str, float]:
            return {name: value}

    return Telling


class OneDecisionEach(Healthy):
    """Thinks that every trajectory is one decision."""

    def targets(self, rollouts: Rollouts, policy: PolicyAccess) -> dict[str, Tensor]:
        return {**super().targets(rollouts, policy), "advantages": rollouts.returns}


class DiscountByTokens(Healthy):
    """Divides by the number of decisions but one, which for a choice is zero."""

    def targets(self, rollouts: Rollouts, policy: PolicyAccess) -> dict[str, Tensor]:
        share = (rollouts.returns / (rollouts.decisions - 1)).repeat_interleave(rollouts.decisions)
        return {**super().targets(rollouts, policy), "advantages": share}


class FirstActionOnly(Healthy):
    """Counts the decisions of the first turn."""

    def targets(self, rollouts: Rollouts, policy: PolicyAccess) -> dict[str, Tensor]:
        counts = torch.tensor([item.actions[0].decisions for item in rollouts.trajectories])
        return {**super().targets(rollouts, policy), "advantages": rollouts.returns.repeat_interleave(counts)}


class LearnsFromTheFirstTurn(Healthy):
    def loss(self, batch: Batch, output: PolicyOutput) -> Loss:
        first = [
            float(number == 0)
            for item in batch.trajectories
            for number, action in enumerate(item.actions)
            for _ in range(action.decisions)
        ]
        return Loss((torch.tensor(first) * batch.weights * self.token_loss(batch, output)).sum(), {})


class DecisionsAreTokens(Healthy):
    """Gives every token of an answer a decision of its own, also those of a choice."""

    def targets(self, rollouts: Rollouts, policy: PolicyAccess) -> dict[str, Tensor]:
        lengths = [sum(len(action.tokens) for action in item.actions) for item in rollouts.trajectories]
        scores = [part.sum() for part in rollouts.old_logprobs.split(lengths)]
        return {**super().targets(rollouts, policy), "advantages": torch.stack(scores)}


class OtherGroupsAsBaseline(Healthy):
    def advantages(self, rollouts: Rollouts) -> Tensor:
        other = rollouts.group[:, None] != rollouts.group[None, :]
        return rollouts.returns - (other.float() @ rollouts.returns) / other.sum(1)


class NoEpsilon(Healthy):
    def advantages(self, rollouts: Rollouts) -> Tensor:
        return (rollouts.returns - rollouts.returns.mean()) / rollouts.returns.std()


class ExponentialReturns(Healthy):
    def advantages(self, rollouts: Rollouts) -> Tensor:
        return rollouts.returns.exp()


class MeanOfTheMicroBatch(Healthy):
    def loss(self, batch: Batch, output: PolicyOutput) -> Loss:
        return Loss(self.token_loss(batch, output).mean(), super().loss(batch, output).metrics)


class MetricOfTheMicroBatch(Healthy):
    def loss(self, batch: Batch, output: PolicyOutput) -> Loss:
        result = super().loss(batch, output)
        return Loss(result.total, {**result.metrics, "policy/entropy": output.entropies.detach().mean()})


class ShiftedByOne(Healthy):
    def targets(self, rollouts: Rollouts, policy: PolicyAccess) -> dict[str, Tensor]:
        return {name: column.roll(1) for name, column in super().targets(rollouts, policy).items()}


class LossThatScalesItsColumns(Healthy):
    def token_loss(self, batch: Batch, output: PolicyOutput) -> Tensor:
        return -output.logprobs * batch.advantages.mul_(0.5) + 0 * output.heads["value"][:, 0]


class ClippedLogprobsInPlace(Healthy):
    def prepare(self, trajectories: Sequence[Trajectory], policy: PolicyAccess) -> Any:
        for trajectory in trajectories:
            for action in trajectory.actions:
                action.logprobs.clip(-1.0, None, out=action.logprobs)
        return super().prepare(trajectories, policy)


class OwnRandomness(Healthy):
    def advantages(self, rollouts: Rollouts) -> Tensor:
        return super().advantages(rollouts) + float(np.random.default_rng().normal())


class SharedMean(Healthy):
    shared: ClassVar[list[float]] = []

    def advantages(self, rollouts: Rollouts) -> Tensor:
        self.shared.append(float(rollouts.returns.mean()))
        return rollouts.returns - sum(self.shared) / len(self.shared)


class ForgetfulCheckpoint(Healthy):
    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        return


class UnsavableState(Healthy):
    def state_dict(self) -> dict[str, Any]:
        return {"running": self.running, "seen": {1, 2}}


class WrongSign(Healthy):
    def token_loss(self, batch: Batch, output: PolicyOutput) -> Tensor:
        return output.logprobs * batch.advantages + 0 * output.heads["value"][:, 0]


MUTANTS: dict[str, list[tuple[type[Healthy], str]]] = {
    "it_says_what_the_loop_must_provide": [
        (GroupSizeAsText, "group_size is '4'"),
        (UnknownExperience, "experience is 'replay'"),
        (HeadsAsAList, r"heads is \['value'\]"),
        (HeadsAsNumbers, r"heads is \{'value': 1\}"),
        (HeadOfNothing, "the size positive or 'choices'"),
        (CopiesAsAText, "copies is 'reference'; expected a sequence"),
        (NoBehaviour, r"behaviour\(\) returned NoneType"),
        (ExploresTooMuch, "epsilon 1.5"),
        (WithoutGroupSize, "no attribute 'group_size'"),
    ],
    "every_head_that_it_declares_learns": [(HeadThatNobodyReads, "head 'other' is declared")],
    "the_copies_that_are_asked_for_are_those_declared": [
        (CopyThatNobodyReads, r"copies \['target'\] of the policy are declared, and not asked for"),
        (CopyThatNobodyDeclared, r"copies \['target'\] of the policy are asked for, and not in `copies`"),
    ],
    "batches_hold_whole_known_turns_and_finite_columns": [
        (Lazy, "yielded no batch"),
        (FirstTokenOnly, "parts of such"),
        (EmptyBatches, "batch 2 holds no trajectory"),
        (ColumnsWithGradients, "'free' of batch 1 carries a gradient"),
        (ColumnsOfNaN, "'odds' of batch 1 is not finite"),
    ],
    "the_loss_is_a_finite_scalar_with_a_gradient": [
        (DetachedLoss, "has no gradient"),
        (LossOfEachDecision, r"has shape \(\d+,\)"),
        (InfiniteLoss, "is -?inf"),
        (NothingToLearn, "nothing is learnt"),
    ],
    "metrics_are_finite_scalars_with_names_of_their_own": [
        (reporting("entropy"), "a metric is named 'entropy'"),
        (reporting("reward/mean"), "metric of its own as 'reward/mean'"),
        (reporting("policy/grad_norm"), "metric of its own as 'policy/grad_norm'"),
        (reporting("policy/logprobs", lambda output: output.logprobs.detach()), r"is Tensor of shape \(\d+,\)"),
        (reporting("policy/share", lambda output: 0.5), r"is float of shape \(\)"),
        (reporting("policy/odds", lambda output: output.logprobs.detach().sum().log()), "'policy/odds' is nan"),
        (reporting("policy/sum", lambda output: output.logprobs.sum()), "detach it"),
    ],
    "what_it_reports_are_finite_numbers_with_names_of_their_own": [
        (telling("error", 1.0), r"report\(\) names a metric 'error'"),
        (telling(3, 1.0), r"report\(\) names a metric 3"),
        (telling("rollout/turns", 1.0), "metric of its own as 'rollout/turns'"),
        (telling("value/error", math.nan), "gives 'value/error' as nan"),
        (telling("value/error", torch.tensor(1.0)), r"as tensor\(1\.\); expected a finite number"),
    ],
    "it_learns_from_texts": [(OneDecisionEach, "raised TrainingError: .advantages. has shape")],
    "it_learns_from_choices": [(DiscountByTokens, "became (nan|inf|-inf)|not finite")],
    "it_learns_from_several_turns": [(FirstActionOnly, "raised TrainingError: .advantages. has shape")],
    "every_turn_is_learnt_from": [(LearnsFromTheFirstTurn, r"no decision of turns \[2, 3\] of 3")],
    "it_learns_from_texts_and_choices_in_one_batch": [(DecisionsAreTokens, "raised RuntimeError: split")],
    "one_group_alone_is_enough": [(OtherGroupsAsBaseline, "became (nan|inf|-inf)|not finite")],
    "equal_returns_do_no_harm": [(NoEpsilon, "became (nan|inf|-inf)|not finite")],
    "returns_of_any_scale_do_no_harm": [(ExponentialReturns, "became (nan|inf|-inf)|not finite")],
    "the_cut_into_micro_batches_changes_nothing": [
        (MeanOfTheMicroBatch, "change the gradient by"),
        (MetricOfTheMicroBatch, "metric 'policy/entropy' is"),
    ],
    "the_order_of_trajectories_changes_nothing": [(ShiftedByOne, "in the opposite order change the gradient")],
    "trajectories_and_batches_are_left_as_they_are": [
        (LossThatScalesItsColumns, "changed column 'advantages'"),
        (ClippedLogprobsInPlace, "the trajectory 'script 0' was changed"),
    ],
    "the_same_input_gives_the_same_batches_and_gradients": [(OwnRandomness, "differ in column 'advantages'")],
    "two_objects_share_no_state": [(SharedMean, "changes column 'advantages' of another")],
    "what_it_keeps_survives_a_checkpoint": [
        (ForgetfulCheckpoint, "a resumed run would not be"),
        (UnsavableState, "cannot be saved: seen is a set"),
    ],
    "it_learns_which_choice_is_rewarded": [(WrongSign, "has probability 0.0")],
}


class Suite(AlgorithmConformance):
    """The suite on a class of this file."""

    def __init__(self, made: type[Healthy]) -> None:
        self.made = made

    def create(self) -> Healthy:
        return self.made()


def test_every_check_has_a_mutant() -> None:
    own = [name for name in checks_of(AlgorithmConformance) if name not in checks_of(Conformance)]
    assert [f"test_{check}" for check in MUTANTS] == own


@pytest.mark.parametrize(
    ("check", "mutant", "message"),
    [(check, *mutant) for check, mutants in MUTANTS.items() for mutant in mutants],
)
def test_a_mutant_is_caught(check: str, mutant: type[Healthy], message: str) -> None:
    with pytest.raises(ConformanceError, match=message):
        getattr(Suite(mutant), f"test_{check}")()


def test_a_healthy_algorithm_passes() -> None:
    check_algorithm(Healthy)


@pytest.mark.parametrize("made", [ToyGradient, ToyCritic, ToyImitation])
def test_the_toy_algorithms_pass(made: type[PolicyGradient]) -> None:
    check_algorithm(lambda: made(ToyGradientConfig(group_size=3)))


def test_an_algorithm_that_needs_choices_is_given_nothing_else() -> None:
    class OfChoices(Healthy):
        def prepare(self, trajectories: Sequence[Trajectory], policy: PolicyAccess) -> Any:
            assert all(action.choice is not None for item in trajectories for action in item.actions)
            return super().prepare(trajectories, policy)

    check_algorithm(OfChoices, needs={"choices"})
    with pytest.raises(ConformanceError, match="it learns from texts"):
        check_algorithm(OfChoices)


def test_every_failure_is_listed_and_learning_can_be_left_out() -> None:
    with pytest.raises(ConformanceError, match=r"which choice is rewarded"):
        check_algorithm(WrongSign)
    with pytest.raises(ConformanceError) as caught:
        check_algorithm(WrongSign, learns=False)
    assert "which choice is rewarded" not in str(caught.value)
    assert "every head that it declares learns: the head 'value'" in str(caught.value)
