"""This package's rewards, data sets and environments keep the contract of their kinds."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rllava_core.mdp.examples import Example
from rllava_core.mdp.messages import Action, Observation
from rllava_core.testing import samples
from rllava_core.testing.datasets import DatasetConformance
from rllava_core.testing.environments import EnvironmentConformance
from rllava_core.testing.rewards import RewardConformance


class TestExactMatch(RewardConformance):
    component = "exact_match"


class TestAnswerFormat(RewardConformance):
    component = "answer_format"


class TestContains(RewardConformance):
    component = "contains"


class TestNumeric(RewardConformance):
    component = "numeric"
    options = {"relative": 0.01}


class TestDigits(DatasetConformance):
    component = "digits"


class TestDigitScenes(DatasetConformance):
    component = "digit_scenes"


class TestJsonLines(DatasetConformance):
    component = "jsonl"

    @pytest.fixture(autouse=True)
    def file(self, tmp_path: Path) -> None:
        lines: list[dict[str, Any]] = []
        for number in range(12):
            samples.picture(number).to_pil().save(tmp_path / f"{number}.png")
            images = [f"{number}.png", f"{number // 2}.png"][: 1 + number % 2]
            boxes = [[0, 0, 4, 4]] if len(images) == 1 else None
            line = {"image": images, "question": "How many?", "answer": number % 3, "among": [0, 1, 2], "boxes": boxes}
            lines.append(line)
        path = tmp_path / "train.jsonl"
        path.write_text("\n".join(json.dumps(line) for line in lines), encoding="utf-8")
        self.options = {"path": str(path), "choices": "among", "boxes": "boxes", "held_out_fraction": 0.25}


class TestClassFolder(DatasetConformance):
    component = "folder"

    @pytest.fixture(autouse=True)
    def folder(self, tmp_path: Path) -> None:
        for number in range(12):
            path = tmp_path / "animals" / ("cat", "dog", "axolotl")[number % 3] / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            samples.picture(number).to_pil().save(path)
        self.options = {"path": str(tmp_path / "animals"), "classes_as_choices": True}


class TestZoom(EnvironmentConformance):
    component = "zoom"
    options = {"overview_size": 4, "zoom_limit": 3}
    task = {"choices": samples.ANSWERS}
    max_turns = 4


class TestZoomOfBoxes(EnvironmentConformance):
    component = "zoom"
    options = {"overview_size": 4, "view_size": 32, "zoom_names": ["A", "B", "C", "D"]}
    task = {"choices": samples.ANSWERS, "history": 1}
    max_turns = 5

    def examples(self) -> list[Example]:
        boxes = [[0, 0, 3, 3], [2.5, 1, 8, 8]]
        return [replace(example, fields={**example.fields, "boxes": boxes}) for example in samples.examples()]


class TestZoomWithoutZooms(EnvironmentConformance):
    component = "zoom"
    options = {"zoom_limit": 0}
    task = {"choices": samples.ANSWERS}
    max_turns = 1


class TestZoomText(EnvironmentConformance):
    component = "zoom_text"
    options = {"overview_size": 4, "zoom_limit": 3}
    max_turns = 4

    def actions(self, observation: Observation) -> list[Action]:
        texts = ("zoom 0 0 4 4", "zoom 0 0 99 99", "answer 7", "what?", "zoom 1.5 2 3 8")
        return [Action(text) for text in texts]


class TestZoomTextThatForgets(EnvironmentConformance):
    component = "zoom_text"
    options = {"view_size": 16}
    task = {"history": 1}
    max_turns = 5
