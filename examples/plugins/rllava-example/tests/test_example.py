"""The conformance kit, and what the kit cannot know: the paper's formula, the reward's values, the log's lines."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from rllava_core.algorithms.protocol import Batch
from rllava_core.policy.policy import PolicyOutput
from rllava_core.testing import AlgorithmConformance, RewardConformance
from rllava_core.testing.samples import episode
from rllava_example import log
from rllava_example.algorithm import CISPO
from rllava_example.config import CISPOConfig


class TestCISPO(AlgorithmConformance):
    component = "rllava-example/cispo"


class TestDistinctWords(RewardConformance):
    component = "rllava-example/distinct_words"

    def test_repetition_costs(self) -> None:
        answers = ["a cat", "a cat a cat", "A a", ""]

        assert self.create()([episode(None, answer) for answer in answers]) == [1.0, 0.5, 0.5, 0.0]


@pytest.mark.parametrize(("old", "now", "advantage"), [(-1.0, -1.2, 2.0), (-3.0, -1.0, 1.5), (-2.0, -1.0, -0.5)])
def test_every_decision_has_a_gradient_by_its_clipped_weight(old: float, now: float, advantage: float) -> None:
    """Equation 4: the gradient of −min(exp(now − old), 1 + clip_high)·A·log π, the weight held constant."""
    logprobs = torch.tensor([now], dtype=torch.float64, requires_grad=True)
    trajectory = episode(None, "a", choices=("a", "b"))  # one decision
    batch = Batch((trajectory,), {"old_logprobs": torch.tensor([old]), "advantages": torch.tensor([advantage])})

    loss = CISPO(CISPOConfig(clip_high=0.5)).token_loss(batch, PolicyOutput(logprobs, torch.zeros(1), {}))
    loss.sum().backward()

    assert logprobs.grad is not None
    assert logprobs.grad.item() == pytest.approx(-min(math.exp(now - old), 1.5) * advantage)


def test_the_log_has_a_line_a_step(tmp_path: Path) -> None:
    log.rllava_run_start(tmp_path)
    log.rllava_step_end(1, {"reward/mean": 0.25})
    log.rllava_step_end(2, {"reward/mean": 0.5})

    assert (tmp_path / "log.txt").read_text() == "step 1: reward 0.250\nstep 2: reward 0.500\n"
