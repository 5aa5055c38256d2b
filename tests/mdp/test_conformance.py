"""The core's own environment, and the toy's parts, keep the contract that third parties are held to."""

from __future__ import annotations

from rllava_core.testing.datasets import DatasetConformance
from rllava_core.testing.environments import EnvironmentConformance
from rllava_core.testing.rewards import RewardConformance


class TestSingleTurn(EnvironmentConformance):
    component = "single_turn"
    task = {"prompt": "{image} {question} Answer with one word."}


class TestSingleTurnWithChoices(EnvironmentConformance):
    component = "single_turn"
    task = {"choices": ["7", "42", "365"]}


class TestBrightness(EnvironmentConformance):
    component = "brightness"


class TestMatch(RewardConformance):
    component = "match"


class TestColours(DatasetConformance):
    component = "colours"
    options = {"images": 2}
