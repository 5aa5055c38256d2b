"""The engine and the reward keep the contract of their kinds, against an endpoint on loopback."""

from __future__ import annotations

import json
from typing import Any

import pytest

from rllava_core.testing import EngineConformance, RewardConformance


class TestEngine(EngineConformance):
    component = "openai"
    cache: str | None = "cache/answers"
    choices_by = "json_schema"

    @pytest.fixture(autouse=True)
    def served(self, server: Any) -> None:
        self.options = {
            "base_url": server.base_url,
            "model": "some-model",
            "cache": self.cache,
            "choices_by": self.choices_by,
        }


class TestEngineWithoutACache(TestEngine):
    """Nothing of the contract hangs on what is remembered."""

    cache = None


class TestGuidedEngine(TestEngine):
    choices_by = "guided"


class TestJudge(RewardConformance):
    component = "judge"

    @pytest.fixture(autouse=True)
    def served(self, server: Any) -> None:
        server.answer = self.judged
        self.options = {"base_url": server.base_url, "model": "judge-model"}

    @staticmethod
    def judged(body: Any) -> str:
        return json.dumps({"reason": "so it is", "score": len(str(body["messages"][1])) % 11})
