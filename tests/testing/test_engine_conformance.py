"""Healthy engines pass the suite, and for every check of training there is a bad engine that it catches."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState

from rllava_core.algorithms.protocol import Batch, Loss, LossFunction
from rllava_core.engines.config import LocalRolloutConfig, LocalTrainConfig
from rllava_core.engines.local_rollout import LocalRolloutEngine
from rllava_core.engines.local_train import LocalTrainEngine
from rllava_core.engines.protocol import TrainSetup
from rllava_core.errors import TrainingError
from rllava_core.mdp.trajectory import Trajectory
from rllava_core.policy.policy import PolicyOutput
from rllava_core.testing import (
    Conformance,
    ConformanceError,
    EngineConformance,
    check_rollout_engine,
    check_train_engine,
)
from rllava_core.testing.conformance import checks_of, run
from rllava_core.testing.engines_base import recomputed
from rllava_core.testing.engines_train import TrainChecks


class Healthy(LocalTrainEngine):
    """The local engine on the CPU."""

    def __init__(self, setup: TrainSetup) -> None:
        super().__init__(LocalTrainConfig(device="cpu"), setup)

    def step(self, batch: Batch, loss: LossFunction, learning_rate: float) -> Any:
        return super().step(batch, loss, learning_rate)

    def evaluate(self, trajectories: Sequence[Trajectory], copy: str | None = None) -> PolicyOutput:
        return super().evaluate(trajectories, copy)


class TrainsACopy(Healthy):
    def __init__(self, setup: TrainSetup) -> None:
        super().__init__(replace(setup, policy=copy.deepcopy(setup.policy)))


class LayoutUntold(Healthy):
    layout: Any = None

    def __init__(self, setup: TrainSetup) -> None:
        super().__init__(setup)
        self.layout = None


class NeverSteps(Healthy):
    def __init__(self, setup: TrainSetup) -> None:
        super().__init__(setup)
        self._update._optimizer.step = lambda: None


class TensorsAsMetrics(Healthy):
    def step(self, batch: Batch, loss: LossFunction, learning_rate: float) -> Any:
        return {name: torch.tensor(value) for name, value in super().step(batch, loss, learning_rate).items()}


class LossUnreported(Healthy):
    def step(self, batch: Batch, loss: LossFunction, learning_rate: float) -> Any:
        return {"policy/grad_norm": super().step(batch, loss, learning_rate)["policy/grad_norm"]}


class Uphill(Healthy):
    def step(self, batch: Batch, loss: LossFunction, learning_rate: float) -> Any:
        def negated(micro: Batch, output: PolicyOutput) -> Loss:
            result = loss(micro, output)
            return Loss(-result.total, result.metrics)

        return super().step(batch, negated, learning_rate)


class DropsTheLast(Healthy):
    def step(self, batch: Batch, loss: LossFunction, learning_rate: float) -> Any:
        kept = batch.trajectories[:-1]
        decisions = sum(trajectory.decisions for trajectory in kept)
        columns = {name: column[:decisions] for name, column in batch.columns.items()}
        return super().step(Batch(kept, columns), loss, learning_rate)


class MicroBatchesIgnored(Healthy):
    def __init__(self, setup: TrainSetup) -> None:
        training = setup.training.model_copy(update={"micro_batch_tokens": 10**9})
        super().__init__(replace(setup, training=training))


class MeanMetrics(Healthy):
    def step(self, batch: Batch, loss: LossFunction, learning_rate: float) -> Any:
        count = len(list(batch.split(self._training.micro_batch_tokens)))
        return {name: value / count for name, value in super().step(batch, loss, learning_rate).items()}


class MeanOverMicroBatches(Healthy):
    def step(self, batch: Batch, loss: LossFunction, learning_rate: float) -> Any:
        count = len(list(batch.split(self._training.micro_batch_tokens)))

        def shared(micro: Batch, output: PolicyOutput) -> Loss:
            result = loss(micro, output)
            return Loss(result.total / count, result.metrics)

        return super().step(batch, shared, learning_rate)


class Dropout(Healthy):
    def __init__(self, setup: TrainSetup) -> None:
        super().__init__(setup)
        self.policy.train()


class DetachedOutputs(Healthy):
    def step(self, batch: Batch, loss: LossFunction, learning_rate: float) -> Any:
        def detached(micro: Batch, output: PolicyOutput) -> Loss:
            result = loss(micro, replace(output, logprobs=output.logprobs.detach()))
            return Loss(result.total + 0 * output.logprobs.sum(), result.metrics)

        return super().step(batch, detached, learning_rate)


class NaNSkipped(Healthy):
    def step(self, batch: Batch, loss: LossFunction, learning_rate: float) -> Any:
        with suppress(TrainingError):
            return super().step(batch, loss, learning_rate)
        return {}


class CheckedTooLate(Healthy):
    """Learns from the micro-batches before the one that fails."""

    def step(self, batch: Batch, loss: LossFunction, learning_rate: float) -> Any:
        try:
            return super().step(batch, loss, learning_rate)
        except TrainingError:
            self._update._optimizer.step()
            raise


class AnotherError(Healthy):
    def step(self, batch: Batch, loss: LossFunction, learning_rate: float) -> Any:
        try:
            return super().step(batch, loss, learning_rate)
        except TrainingError as error:
            raise FloatingPointError(str(error)) from None


class GradientsKept(Healthy):
    """Empties the gradients after a step that succeeds, and nowhere else."""

    def __init__(self, setup: TrainSetup) -> None:
        super().__init__(setup)
        optimizer = self._update._optimizer
        self._empty, optimizer.zero_grad = optimizer.zero_grad, lambda: None

    def step(self, batch: Batch, loss: LossFunction, learning_rate: float) -> Any:
        metrics = super().step(batch, loss, learning_rate)
        self._empty()
        return metrics


class RateOfTheConfig(Healthy):
    def step(self, batch: Batch, loss: LossFunction, learning_rate: float) -> Any:
        return super().step(batch, loss, self._training.learning_rate)


class LargestRateForAll(Healthy):
    def step(self, batch: Batch, loss: LossFunction, learning_rate: float) -> Any:
        return super().step(batch, loss, 1e-2 if learning_rate else 0.0)


class LimitIgnored(Healthy):
    def __init__(self, setup: TrainSetup) -> None:
        super().__init__(replace(setup, training=setup.training.model_copy(update={"max_grad_norm": None})))


class LimitPerWeight(Healthy):
    def __init__(self, setup: TrainSetup) -> None:
        super().__init__(replace(setup, training=setup.training.model_copy(update={"max_grad_norm": None})))
        if setup.training.max_grad_norm is not None:
            for parameter in self.policy.parameters():
                parameter.register_hook(lambda gradient: gradient.clamp(-1e-4, 1e-4))


class AnotherOrder(Healthy):
    def evaluate(self, trajectories: Sequence[Trajectory], copy: str | None = None) -> PolicyOutput:
        return super().evaluate(sorted(trajectories, key=lambda item: item.decisions), copy)


class HeadsForgotten(Healthy):
    def evaluate(self, trajectories: Sequence[Trajectory], copy: str | None = None) -> PolicyOutput:
        return replace(super().evaluate(trajectories, copy), heads={})


class FinalStatesForgotten(Healthy):
    def evaluate(self, trajectories: Sequence[Trajectory], copy: str | None = None) -> PolicyOutput:
        return replace(super().evaluate(trajectories, copy), final={})


class FinalStatesOfTheTruncatedAlone(Healthy):
    def evaluate(self, trajectories: Sequence[Trajectory], copy: str | None = None) -> PolicyOutput:
        output = super().evaluate(trajectories, copy)
        left = [item.truncated for item in trajectories]
        return replace(output, final={name: values[left] for name, values in output.final.items()})


class GraphKept(Healthy):
    def evaluate(self, trajectories: Sequence[Trajectory], copy: str | None = None) -> PolicyOutput:
        return replace(self.policy(self._pack(trajectories)), final=super().evaluate(trajectories, copy).final)


class CopyIsThePolicy(Healthy):
    def evaluate(self, trajectories: Sequence[Trajectory], copy: str | None = None) -> PolicyOutput:
        return super().evaluate(trajectories)


class CopyDrifts(Healthy):
    def step(self, batch: Batch, loss: LossFunction, learning_rate: float) -> Any:
        metrics = super().step(batch, loss, learning_rate)
        for kept in self._copies.values():
            kept.load_state_dict(self.policy.state_dict())
        return metrics


class NeverUpdates(Healthy):
    def update_copy(self, copy: str, rate: float = 1.0) -> None:
        self._updated.add(copy)


class RateIgnored(Healthy):
    def update_copy(self, copy: str, rate: float = 1.0) -> None:
        super().update_copy(copy)


class RateTheOtherWayRound(Healthy):
    def update_copy(self, copy: str, rate: float = 1.0) -> None:
        super().update_copy(copy, 1 - rate)


class HeadsNotUpdated(Healthy):
    def update_copy(self, copy: str, rate: float = 1.0) -> None:
        heads = {name: values.clone() for name, values in self._copies[copy].heads.state_dict().items()}
        super().update_copy(copy, rate)
        self._copies[copy].heads.load_state_dict(heads)


class UpdatesOnce(Healthy):
    def update_copy(self, copy: str, rate: float = 1.0) -> None:
        if copy not in self._updated:
            super().update_copy(copy, rate)


class CopiesForgotten(Healthy):
    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "copies": {}}


class CopiesOfThePolicyInTheState(Healthy):
    """Takes a copy that was never updated for the policy as it is now."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        for name in set(self._copies) - self._updated:
            self._copies[name].load_state_dict(self.policy.state_dict())


class MomentsForgotten(Healthy):
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        return


class UnsavableState(Healthy):
    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "optimizer_object": self._update._optimizer}


class NoAutocast(Healthy):
    def autocast(self) -> Any:
        return None


class HalfPrecisionWhileSampling(Healthy):
    def evaluate(self, trajectories: Sequence[Trajectory], copy: str | None = None) -> PolicyOutput:
        return recomputed(self.policy, trajectories)

    def autocast(self) -> Any:
        return torch.autocast("cpu", torch.bfloat16)


MUTANTS: dict[str, list[tuple[type[Healthy], str]]] = {
    "the_policy_is_the_one_that_was_given_and_is_not_wrapped": [(TrainsACopy, "not the Policy of the setup")],
    "it_says_how_batches_are_laid_out": [(LayoutUntold, "layout is None")],
    "a_step_changes_the_weights_and_reports_what_the_loss_does": [
        (NeverSteps, "as they were"),
        (TensorsAsMetrics, "expected floats by name"),
        (LossUnreported, "own metrics conformance/decisions, conformance/loss"),
        (Uphill, "lowered the mean log-prob"),
    ],
    "every_trajectory_is_learnt_from_once_and_metrics_are_summed": [
        (DropsTheLast, "expected each once"),
        (MicroBatchesIgnored, "larger than micro_batch_tokens"),
        (MeanMetrics, "metrics are sums"),
    ],
    "a_step_does_not_depend_on_the_micro_batches": [
        (MeanOverMicroBatches, "do not divide by their number"),
        (MeanMetrics, "of its micro-batches"),
    ],
    "what_is_learnt_from_is_what_the_policy_says": [
        (Dropout, "the loss is given log-probs that differ"),
        (DetachedOutputs, "without a gradient"),
    ],
    "a_loss_that_is_not_finite_is_refused_and_leaves_no_trace": [
        (NaNSkipped, "was accepted"),
        (CheckedTooLate, "the weights have changed"),
        (AnotherError, "raised FloatingPointError"),
        (GradientsKept, "its gradients were kept"),
    ],
    "a_gradient_that_is_not_finite_is_refused_and_leaves_no_trace": [
        (NaNSkipped, "was accepted"),
        (CheckedTooLate, "the weights have changed"),
    ],
    "the_learning_rate_of_each_step_is_honoured": [
        (RateOfTheConfig, "learning rate 0 changed"),
        (LargestRateForAll, "a hundred times as far"),
    ],
    "the_gradient_is_limited_to_max_grad_norm": [(LimitIgnored, "scaled down, as a whole"), (LimitPerWeight, "whole")],
    "evaluate_is_what_the_policy_says": [
        (AnotherOrder, "or another order"),
        (HeadsForgotten, "head 'value' of shape None"),
        (FinalStatesForgotten, "head 'value' in final states of shape None"),
        (FinalStatesOfTheTruncatedAlone, "head 'value' in final states of shape"),
        (GraphKept, "with a graph"),
    ],
    "a_copy_stays_what_it_was_until_it_is_updated": [
        (CopyIsThePolicy, r"evaluate\(\) gives, of a copy, log-probs that differ"),
        (CopyDrifts, "after steps a copy gives"),
        (NeverUpdates, r"after update_copy\(…, 0.25\) a copy gives"),
        (RateIgnored, r"after update_copy\(…, 0.25\) a copy gives"),
        (RateTheOtherWayRound, r"after update_copy\(…, 0.25\) a copy gives"),
        (HeadsNotUpdated, r"after update_copy\(…, 0.25\) a copy gives head 'value'"),
        (UpdatesOnce, r"after update_copy\(\) a copy gives"),
    ],
    "copies_go_on_where_their_state_was_saved": [
        (CopiesForgotten, "the copy 'target' gives"),
        (CopiesOfThePolicyInTheState, "the copy 'reference' gives"),
    ],
    "an_engine_goes_on_exactly_where_its_state_was_saved": [
        (MomentsForgotten, "a resumed run would not be"),
        (UnsavableState, "cannot be saved: optimizer_object is a AcceleratedOptimizer"),
    ],
    "autocast_is_a_context_to_sample_in": [
        (NoAutocast, r"autocast\(\) gave NoneType"),
        (HalfPrecisionWhileSampling, r"within autocast\(\) the policy gives"),
    ],
}


class Suite(EngineConformance):
    """The suite on a class of this file."""

    role = "train"

    def __init__(self, made: type[Healthy]) -> None:
        self.made = made

    def create(self, setup: Any = None) -> Healthy:
        return self.made(setup)


@pytest.fixture(autouse=True)
def precision() -> Iterator[None]:
    """Accelerate keeps one mixed precision a process."""
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


def test_every_check_has_a_mutant() -> None:
    """Those of rollout engines have theirs in a file of their own."""
    own = [name for name in checks_of(TrainChecks) if name not in checks_of(Conformance)]
    assert [f"test_{check}" for check in MUTANTS] == own


@pytest.mark.parametrize(
    ("check", "mutant", "message"),
    [(check, *mutant) for check, mutants in MUTANTS.items() for mutant in mutants],
)
def test_a_mutant_is_caught(check: str, mutant: type[Healthy], message: str) -> None:
    with pytest.raises(ConformanceError, match=message):
        getattr(Suite(mutant), f"test_{check}")()


def test_the_local_engines_pass() -> None:
    check_train_engine(Healthy)
    check_rollout_engine(lambda setup: LocalRolloutEngine(LocalRolloutConfig(), setup))


def test_checks_of_the_other_role_are_skipped() -> None:
    skipped = {outcome.check for outcome in run(Suite(Healthy)) if outcome.status == "skipped"}
    rollout = {name.removeprefix("test_") for name in checks_of(EngineConformance)} - {
        name.removeprefix("test_") for name in checks_of(TrainChecks)
    }
    assert rollout <= skipped
    assert not skipped & set(MUTANTS)


def test_every_failure_is_listed() -> None:
    with pytest.raises(ConformanceError) as caught:
        check_train_engine(MeanMetrics)
    assert "metrics are summed: a metric that counts" in str(caught.value)
    assert "does not depend on the micro batches: metric" in str(caught.value)
