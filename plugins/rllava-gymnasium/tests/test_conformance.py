"""The environment keeps the contract of its kind, whichever Gymnasium environment it plays."""

from __future__ import annotations

from unittest import SkipTest

from rllava_core.testing import EnvironmentConformance
from rllava_core.testing.conformance import require


class Suite(EnvironmentConformance):
    component = "gymnasium"
    max_turns = 8
    seeds = (0, 1)

    def test_an_observation_follows_unless_the_episode_is_over(self) -> None:
        for turn, transition in self._transitions():
            # Beyond the contract: people want to see how an episode ended.
            require(transition.observation is not None, f"no observation after action {turn}")


class TestMiniGrid(Suite):
    options = {"id": "MiniGrid-Empty-Random-6x6-v0", "kwargs": {"tile_size": 8}, "turn_limit": 5}


class TestFrozenLake(Suite):
    options = {"id": "FrozenLake-v1", "actions": ["left", "down", "right", "up"], "frame_size": 64, "turn_limit": 8}


class TestTaxi(Suite):
    options = {"id": "Taxi-v4", "frame_size": 64, "turn_limit": 4, "success": "terminated"}
    task = {"history": 2}


class TestText(Suite):
    options = {
        "id": "minigrid:BabyAI-GoToLocal-v0",
        "kwargs": {"tile_size": 4},
        "turn_limit": 5,
        "action_format": "text",
    }

    def test_choices_are_shown_where_they_are_promised(self) -> None:
        raise SkipTest("action_format: text takes back what the component promises")


del Suite, EnvironmentConformance  # neither is to be collected for itself
