"""Rollout engines that can take no tiny policy are checked on one that their author makes."""

from __future__ import annotations

from typing import Any

import pytest

from rllava_core.engines.config import LocalRolloutConfig
from rllava_core.engines.local_rollout import LocalRolloutEngine
from rllava_core.engines.protocol import RolloutSetup
from rllava_core.errors import ModelError
from rllava_core.policy.policy import Policy
from rllava_core.testing import (
    ConformanceError,
    EngineConformance,
    check_rollout_engine,
)
from rllava_core.testing.conformance import run
from rllava_core.testing.engines_base import ENDS, FORBIDDEN
from rllava_core.testing.rollouts import tiny_policy


class Choosy(LocalRolloutEngine):
    """Samples from models of one family, which the tiny one is not of."""

    def __init__(self, config: LocalRolloutConfig, setup: RolloutSetup) -> None:
        if setup.policy.temperature == TINY_TEMPERATURE:
            raise ModelError("this family cannot be loaded")
        super().__init__(config, setup)


TINY_TEMPERATURE = 2.0


class OnAPolicyOfItsOwn(EngineConformance):
    """What the author of such an engine writes."""

    role = "rollout"
    action_values = False

    def create(self, setup: Any = None) -> Any:
        return Choosy(LocalRolloutConfig(), setup or self.rollout_setup(self.policy()))

    def policy(self, seed: int = 0, heads: Any = None) -> Policy:
        return tiny_policy(heads, seed, 1.7, end_of_turn=ENDS, forbidden_tokens=FORBIDDEN)


def test_an_engine_that_takes_no_tiny_policy_is_checked_on_one_that_its_author_makes() -> None:
    with pytest.raises(ConformanceError, match=r"this family cannot be loaded; override `policy`"):
        check_rollout_engine(lambda setup: Choosy(LocalRolloutConfig(), setup))
    outcomes = {outcome.check: outcome.status for outcome in run(OnAPolicyOfItsOwn())}
    assert "failed" not in outcomes.values()
    assert outcomes["log_probs_are_those_of_the_policy"] == "passed"


def test_plugins_check_leaves_out_what_the_tiny_policy_does_not_suit() -> None:
    suite = OnAPolicyOfItsOwn()
    suite.policy = lambda seed=0, heads=None: tiny_policy(heads, seed, TINY_TEMPERATURE)  # type: ignore[method-assign]
    outcomes = {outcome.check: outcome for outcome in run(suite, quick=True)}
    assert outcomes["log_probs_are_those_of_the_policy"].status == "skipped"
    assert "cannot be loaded" in outcomes["log_probs_are_those_of_the_policy"].message
