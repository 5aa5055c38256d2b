"""The conformance suite of engines, of both roles: what trains the policy, and what samples from it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rllava_core.engines.protocol import AnswerSetup, RolloutEngine, RolloutSetup, TrainEngine, TrainSetup
from rllava_core.testing.conformance import raise_failures, run
from rllava_core.testing.engines_answering import AnswerChecks
from rllava_core.testing.engines_rollout import RolloutChecks
from rllava_core.testing.engines_train import TrainChecks


class EngineConformance(TrainChecks, RolloutChecks, AnswerChecks):
    """Checks of an engine, on the tiny policy. What an author may override:

    role: "train" or "rollout"; the checks of the other role are skipped. None checks what the component provides.
    options: of the engine; in full precision, since most checks compare with the policy in float32.
    policy: what it is checked on, where it cannot take the tiny policy.
    create: how an engine is made, where one that was made is better given another policy by `sync` than made anew.
    logprobs: whether an engine without a spec returns the log-probs of what it samples.
    own_model: whether an engine without a spec answers by a model of its own. Its answers are compared with no policy,
        and checks of their own look at what it does with requests.
    tolerance: largest difference, in nats, from what the policy itself says. Padding and batches of another size
        change float32 sums by 1e-6; other weights, positions or images show from 1e-2 on.
    """


class _Given(EngineConformance):
    """The suite on engines that no plugin registers."""

    def __init__(self, create: Callable[[Any], Any], role: str, logprobs: bool = True, own_model: bool = False) -> None:
        self._create = create
        self.role = role
        self.logprobs = logprobs
        self.own_model = own_model

    def create(self, setup: TrainSetup | RolloutSetup | AnswerSetup | None = None) -> Any:
        return self._create(setup) if setup is not None else super().create()


def check_train_engine(create: Callable[[TrainSetup], TrainEngine]) -> None:
    """Run the suite on the engines that `create` makes of a setup. Raises ConformanceError that lists every failure."""
    raise_failures(run(_Given(create, "train")))


def check_rollout_engine(create: Callable[[RolloutSetup], RolloutEngine], *, logprobs: bool = True) -> None:
    """Run the suite on the engines that `create` makes of a setup. Raises ConformanceError that lists every failure.

    policy: what it is checked on, where it cannot take the tiny policy.
    create: how an engine is made, where one that was made is better given another policy by `sync` than made anew.
    logprobs: whether the engine returns the log-probs of what it samples.
    """
    raise_failures(run(_Given(create, "rollout", logprobs)))


def check_answering_engine(create: Callable[[AnswerSetup], RolloutEngine]) -> None:
    """Run the suite on the engines, which answer by a model of their own, that `create` makes of a setup. Raises
    ConformanceError that lists every failure."""
    raise_failures(run(_Given(create, "rollout", own_model=True)))
