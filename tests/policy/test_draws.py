"""What is drawn: in proportion, by a seed, a number and a place alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rllava_core.policy.draws import draw, uniforms


def points(seed: int, count: int) -> torch.Tensor:
    return torch.from_numpy(uniforms(seed, range(count), 1)[:, 0])


@pytest.mark.parametrize("words", [3, 256, 257, 70_000])
def test_tokens_are_drawn_in_proportion(words: int) -> None:
    """A few that are likely, at the edges and in blocks of their own, many that are not, and a third that may not be
    drawn at all."""
    draws = 40_000 if words < 1000 else 6_000
    generator = torch.Generator().manual_seed(5)
    logits = torch.randn(words, generator=generator)
    likely = torch.tensor(sorted({0, 1, min(255, words - 2), min(256, words - 1), words // 2, words - 2, words - 1}))
    logits[likely] += torch.linspace(3, 4, len(likely)) if words < 1000 else torch.linspace(8.8, 10, len(likely))
    never = torch.randperm(words, generator=generator)[: words // 3]
    logits[never[~torch.isin(never, likely)]] = -torch.inf
    logprobs = torch.log_softmax(logits, dim=0)

    drawn = torch.cat([draw(logprobs.expand(500, -1), points(seed, 500)) for seed in range(draws // 500)])

    assert torch.isfinite(logprobs[drawn]).all()
    for group in [*likely.split(1), torch.arange(words // 3), torch.arange(words // 2, words)]:
        share = float(logprobs[group].double().exp().sum())
        found = float(torch.isin(drawn, group).double().mean())
        assert abs(found - share) < 4 * (share * (1 - share) / draws) ** 0.5 + 1e-9, (group[0], found, share)
    assert torch.equal(draw(logprobs.expand(500, -1), points(0, 500)), drawn[:500])


@pytest.mark.parametrize("token", [0, 255, 256, 69_999])
@pytest.mark.parametrize("point", [0.0, 0.5, 1 - 2.0**-53])
def test_one_token_alone_has_a_share_wherever_it_is(token: int, point: float) -> None:
    """The sum of the shares is not quite one."""
    shares = torch.zeros(3, 70_000)
    shares[:, token] = 0.9999
    assert draw(shares.log(), torch.full((3,), point, dtype=torch.float64)).tolist() == [token] * 3


def test_without_points_the_most_probable_token_is_taken() -> None:
    assert draw(torch.tensor([[-3.0, -1.0, -2.0], [-0.5, -1.0, -2.0]]), None).tolist() == [1, 0]


def test_points_are_uniform_and_do_not_repeat_each_other() -> None:
    found = uniforms(7, range(200), 300)
    assert found.shape == (200, 300)
    assert found.min() >= 0
    assert found.max() < 1
    assert len(np.unique(found)) == found.size
    # Chi-square of 100 equal bins: mean 99, deviation 14.
    counts = np.bincount((found.ravel() * 100).astype(int), minlength=100)
    assert 99 - 5 * 14 < ((counts - 600) ** 2 / 600).sum() < 99 + 5 * 14
    # Neighbours in episode, in place and in seed are not correlated: deviation 1/√60,000 = 0.004.
    pairs = [
        (found[:-1], found[1:]),
        (found[:, :-1], found[:, 1:]),
        (found, uniforms(8, range(200), 300)),
        (found[:100], found[100:]),
    ]
    for one, other in pairs:
        assert abs(np.corrcoef(one.ravel(), other.ravel())[0, 1]) < 0.02


def test_a_point_depends_on_seed_number_and_place_alone() -> None:
    whole = uniforms(2**63 - 1, [5, 900, 2**40], 8)
    np.testing.assert_array_equal(uniforms(2**63 - 1, [900], 3), whole[1:2, :3])
    assert not np.array_equal(uniforms(0, [5], 8), whole[:1])
