"""This package's rewards and data sets keep the contract of their kinds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rllava_core.testing import samples
from rllava_core.testing.datasets import DatasetConformance
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


class TestJsonLines(DatasetConformance):
    component = "jsonl"

    @pytest.fixture(autouse=True)
    def file(self, tmp_path: Path) -> None:
        lines: list[dict[str, Any]] = []
        for number in range(12):
            samples.picture(number).to_pil().save(tmp_path / f"{number}.png")
            images = [f"{number}.png", f"{number // 2}.png"][: 1 + number % 2]
            lines.append({"image": images, "question": "How many?", "answer": number % 3, "among": [0, 1, 2]})
        path = tmp_path / "train.jsonl"
        path.write_text("\n".join(json.dumps(line) for line in lines), encoding="utf-8")
        self.options = {"path": str(path), "choices": "among", "held_out_fraction": 0.25}


class TestClassFolder(DatasetConformance):
    component = "folder"

    @pytest.fixture(autouse=True)
    def folder(self, tmp_path: Path) -> None:
        for number in range(12):
            path = tmp_path / "animals" / ("cat", "dog", "axolotl")[number % 3] / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            samples.picture(number).to_pil().save(path)
        self.options = {"path": str(tmp_path / "animals"), "classes_as_choices": True}
