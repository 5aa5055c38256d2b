"""What becomes of gradients: steps taken one weight at a time, on the host, or rounded at random."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from rllava_core.engines.updates import StreamedUpdate, stochastically_rounded


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rllava_core.engines.updates.PIECE", 999)


def adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1.0, weight_decay=0.0)


def stepped(weights: torch.Tensor, steps: int, rate: float, **how: bool) -> torch.Tensor:
    """Weights after steps on a gradient of ones, which Adam makes steps of the learning rate."""
    parameter = nn.Parameter(weights.clone())
    options = {"on_cpu": False, "at_once": False, "stochastic": False, **how}
    update = StreamedUpdate([parameter], adamw, None, **options)
    for _ in range(steps):
        update.begin(1, rate)
        parameter.sum().backward()
        update.finish()
    return parameter.detach()


@pytest.mark.parametrize("at_once", [False, True])
@pytest.mark.usefixtures("small_pieces")
def test_small_steps_add_up_where_there_are_masters_or_rounding_is_random(at_once: bool) -> None:
    """100 steps of 1e-4 from 1, where the next bfloat16 below is 0.004 away."""
    torch.manual_seed(0)
    ones = torch.ones(4000, dtype=torch.bfloat16)
    assert (stepped(ones, 100, 1e-4, at_once=at_once) == 1).all()
    assert (stepped(ones, 100, 1e-4, at_once=at_once, on_cpu=True) == torch.tensor(0.99).bfloat16()).all()
    rounded = stepped(ones, 100, 1e-4, at_once=at_once, stochastic=True)
    assert rounded.dtype == torch.bfloat16
    assert rounded.double().mean() == pytest.approx(0.99, abs=3e-4)
    assert len(rounded.unique()) > 3


def test_rounding_at_random_is_right_on_average() -> None:
    values = torch.tensor([1.0, 1.001, -3.14159, 1e-20, -7e30, 0.0, float("inf"), float("-inf"), 3.4e38])
    torch.manual_seed(0)
    drawn = torch.stack([stochastically_rounded(values).double() for _ in range(4000)])
    assert set(drawn[:, 1].tolist()) == {1.0, 1.0078125}
    assert set(drawn[:, 0].tolist()) == {1.0}
    assert torch.allclose(drawn[:, :5].mean(0), values[:5].double(), rtol=0.0078 / 60)
    assert drawn[0, 5:8].tolist() == [0.0, float("inf"), float("-inf")]
    assert stochastically_rounded(torch.tensor([float("nan")])).isnan().all()


def test_gradients_are_handed_over_as_they_are_made_and_add_up_over_passes() -> None:
    parameter = nn.Parameter(torch.zeros(3))
    update = StreamedUpdate([parameter], adamw, 1.0, on_cpu=True, at_once=False, stochastic=False)
    update.begin(2, 0.1)
    for scale in (3.0, 1.0):
        (parameter * scale).sum().backward()
        assert parameter.grad is None
    assert float(update.finish()) == pytest.approx(4 * 3**0.5)
    assert torch.allclose(parameter, torch.full((3,), -0.1))


def test_the_weights_stay_if_a_gradient_is_not_finite() -> None:
    parameter = nn.Parameter(torch.ones(3))
    update = StreamedUpdate([parameter], adamw, 1.0, on_cpu=True, at_once=False, stochastic=False)
    update.begin(1, 0.1)
    (parameter * float("nan")).sum().backward()
    assert update.finish().isnan()
    assert (parameter == 1).all()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_what_is_on_the_host_takes_no_memory_of_the_device() -> None:
    parameter = nn.Parameter(torch.zeros(2**22, device="cuda", dtype=torch.bfloat16))
    update = StreamedUpdate([parameter], adamw, 1.0, on_cpu=True, at_once=False, stochastic=False)
    before = torch.cuda.memory_allocated()
    update.begin(1, 0.1)
    parameter.sum().backward()
    update.finish()
    assert torch.cuda.memory_allocated() == before
    assert torch.allclose(parameter.float(), torch.full_like(parameter, -0.1).float())
