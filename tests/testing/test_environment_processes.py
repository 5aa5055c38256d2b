"""An environment must be the same in every process: the one check that needs an installed component."""

from __future__ import annotations

from typing import Any

import pytest

from rllava_core.testing import EnvironmentConformance
from rllava_core.testing.conformance import run
from rllava_core.testing.values import digest

CHECK = "a_new_process_plays_the_same_episodes"

# Nine words, for five stand in one order in two processes now and then.
SOURCE = """
import numpy as np
from rllava_core import ComponentSpec, hookimpl
from rllava_core.mdp.messages import Message, Observation, Transition

class Guess:
    def __init__(self, config, task):
        self.right = ""

    def reset(self, *, seed, example):
        choices = tuple({order}({{"left", "right", "up", "down", "back", "near", "far", "north", "south"}}))
        self.right = choices[{draw} % 9]
        return Observation((Message.user("Which way?"),), choices)

    def step(self, action):
        return Transition(float(action.text == self.right), None, terminated=True)

@hookimpl
def rllava_environments():
    return [ComponentSpec(name="guess", target="rllava_guess:Guess", summary="Guess.", provides={{"choices"}})]
"""


@pytest.mark.parametrize(
    ("order", "draw", "status"),
    [
        ("sorted", "seed", "passed"),
        ("list", "seed", "failed"),
        ("sorted", "hash(str(seed))", "failed"),
    ],
)
def test_episodes_that_differ_between_processes_are_found(
    fake_distribution: Any, order: str, draw: str, status: str
) -> None:
    fake_distribution("rllava-guess", "1.0", SOURCE.format(order=order, draw=draw))
    suite = type("Suite", (EnvironmentConformance,), {"component": "guess", "seeds": tuple(range(8))})()

    found = {outcome.check: outcome for outcome in run(suite)}

    assert found[CHECK].status == status, found[CHECK].message
    assert ("order of a set" in found[CHECK].message) == (status == "failed")
    assert found["a_new_object_gives_the_same_observation"].status == "passed"


def test_a_suite_that_another_process_does_not_know_is_skipped(fake_distribution: Any) -> None:
    fake_distribution("rllava-guess", "1.0", SOURCE.format(order="sorted", draw="seed"))

    class Suite(EnvironmentConformance):
        component = "guess"

        def examples(self) -> list[None]:
            return [None]

    found = {outcome.check: outcome for outcome in run(Suite())}
    plain = EnvironmentConformance()
    plain.component = "guess"
    assert {outcome.check: outcome.status for outcome in run(plain, quick=True)}[CHECK] == "passed"
    assert (found[CHECK].status, found[CHECK].message) == (
        "skipped",
        "examples is overridden, which another process does not know",
    )


def test_a_digest_does_not_depend_on_the_order_of_sets_and_mappings() -> None:
    assert digest({"a": {1, 2, 3}, "b": [1.5, None]}) == digest({"b": [1.5, None], "a": {3, 2, 1}})
    assert digest([1, 2]) != digest([2, 1])
