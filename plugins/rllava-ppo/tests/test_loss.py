"""The loss of a batch and its gradient, against the papers' equations decision by decision in float64."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from rllava_core.algorithms.protocol import Batch
from rllava_core.policy.policy import PolicyOutput

OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "whitened": {"whiten": True},
    "clip_higher": {"clip_low": 0.1, "clip_high": 0.35},
    "dual_clip": {"dual_clip": 1.3},
    "value_clip": {"value_clip": 0.2, "value_coefficient": 1.5},
    "entropy_bonus": {"entropy_coefficient": 0.05},
    "k2_in_loss": {"kl_coefficient": 0.3, "kl_estimator": "k2"},
    "k3_in_loss": {"kl_coefficient": 0.3},
    "k1_in_reward": {"kl_coefficient": 0.2, "kl_estimator": "k1", "kl_in": "reward"},
    "sequence": {"aggregation": "sequence"},
    "constant": {"aggregation": "constant", "aggregation_length": 7},
    "turns": {"gae": "turn", "turn_gamma": 0.9},
    "both": {"gae": "both", "gamma": 0.99, "turn_gamma": 0.9},
    "everything": {
        "gae": "turn",
        "whiten": True,
        "clip_low": 0.15,
        "clip_high": 0.3,
        "dual_clip": 1.4,
        "value_clip": 0.1,
        "entropy_coefficient": -0.02,
        "kl_coefficient": 0.1,
        "aggregation": "sequence",
    },
}


def moved(output: PolicyOutput, seed: int = 0) -> PolicyOutput:
    """What the policy says after some steps: leaves, far enough off that every bound is crossed somewhere."""
    draw = torch.Generator().manual_seed(seed)

    def shift(values: torch.Tensor, scale: float) -> torch.Tensor:
        noise = torch.randn(values.shape, generator=draw, dtype=torch.float64)
        return (values + scale * noise).requires_grad_()

    return PolicyOutput(
        shift(output.logprobs, 0.4), shift(output.entropies, 0.1), {"value": shift(output.heads["value"], 0.5)}
    )


def by_hand(options: dict[str, Any], batch: Batch, output: PolicyOutput, references: list[float]) -> dict[str, float]:
    """The loss and what is reported beside it; the advantages and targets are the batch's, tested elsewhere."""
    low, high = options.get("clip_low", 0.2), options.get("clip_high", 0.2)
    beta, estimator = options.get("kl_coefficient", 0.0), options.get("kl_estimator", "k3")
    count = {"decisions": sum(one.decisions for one in batch.trajectories), "episodes": len(batch.trajectories)}
    found = dict.fromkeys(
        ("policy/loss", "policy/ratio", "policy/clip_fraction_low", "policy/clip_fraction_high", "policy/kl_old"), 0.0
    )
    found |= dict.fromkeys(("policy/dual_clip_fraction", "value/loss", "value/clip_fraction"), 0.0)
    logprobs, entropies = output.logprobs.tolist(), output.entropies.tolist()
    values = output.heads["value"][:, 0].tolist()
    columns = {name: column.tolist() for name, column in batch.columns.items()}
    place = 0
    for trajectory in batch.trajectories:
        length = trajectory.decisions
        weight = {
            "token": 1 / count["decisions"],
            "sequence": 1 / count["episodes"] / length,
            "constant": 1 / count["episodes"] / options.get("aggregation_length", 1),
        }[options.get("aggregation", "token")]
        for _ in range(length):
            share = 1 / count["decisions"]
            logprob, old = logprobs[place], columns["old_logprobs"][place]
            value, old_value = values[place], columns["old_values"][place]
            advantage, target = columns["advantages"][place], columns["value_targets"][place]
            counted = columns["value_weights"][place]
            ratio = math.exp(logprob - old)
            free, bounded = ratio * advantage, min(max(ratio, 1 - low), 1 + high) * advantage
            surrogate = min(free, bounded)
            if free > bounded:
                found["policy/clip_fraction_low" if ratio < 1 else "policy/clip_fraction_high"] += share
            if options.get("dual_clip") and advantage < 0 and options["dual_clip"] * advantage > surrogate:
                surrogate = options["dual_clip"] * advantage
                found["policy/dual_clip_fraction"] += share
            error = (value - target) ** 2
            if limit := options.get("value_clip"):
                bounded_value = old_value + min(max(value - old_value, -limit), limit)
                if (bounded_value - target) ** 2 > error:
                    error = (bounded_value - target) ** 2
                    found["value/clip_fraction"] += share * counted
            loss = -surrogate + options.get("value_coefficient", 0.5) * counted * error / 2
            loss -= options.get("entropy_coefficient", 0.0) * entropies[place]
            if beta and options.get("kl_in") != "reward":
                r = references[place] - logprob
                loss += beta * {"k1": -r, "k2": r * r / 2, "k3": math.exp(r) - 1 - r}[estimator]
            found["policy/loss"] += weight * loss
            found["policy/ratio"] += share * ratio
            found["policy/kl_old"] += share * (ratio - 1 - math.log(ratio))
            found["value/loss"] += share * counted * error / 2
            place += 1
    return found


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", OPTIONS)
def test_the_loss_and_its_gradient_equal_the_equations(bench: Any, name: str, seed: int) -> None:
    options = OPTIONS[name]
    episodes = [*bench.random_episodes(seed), *bench.random_episodes(seed + 10), *bench.random_episodes(seed + 20)]
    episodes = [replace(one, group=number, seed=number) for number, one in enumerate(episodes)]
    policy = bench.policy(seed)
    algorithm = bench.algorithm(**options)
    [batch] = algorithm.prepare(episodes, policy)
    # In float64, that differences can be taken; a run has them in the precision of the policy's outputs.
    batch = Batch(batch.trajectories, {key: column.double() for key, column in batch.columns.items()})
    references = batch.columns.get("reference_logprobs", batch.old_logprobs).tolist()
    output = moved(policy.output(episodes), seed)

    loss = algorithm.loss(batch, output)
    expected = by_hand(options, batch, output, references)

    # Or the test would say nothing of them.
    assert (expected["policy/dual_clip_fraction"] > 0) == ("dual_clip" in options)
    assert (expected["value/clip_fraction"] > 0) == ("value_clip" in options)
    for metric, value in loss.metrics.items():
        if metric in expected:
            assert float(value) == pytest.approx(expected[metric], rel=1e-6, abs=1e-9), metric
    assert expected["policy/clip_fraction_low"] > 0
    assert expected["policy/clip_fraction_high"] > 0
    assert {"policy/loss", "policy/ratio", "policy/kl_old", "value/loss"} <= set(loss.metrics)

    loss.total.backward()
    for values in (output.logprobs, output.entropies, output.heads["value"]):
        gradient = torch.zeros_like(values) if values.grad is None else values.grad
        for place in range(0, len(values), 1 + len(values) // 10):
            slope = difference(options, batch, output, values, place, references)
            assert float(gradient.flatten()[place]) == pytest.approx(slope, rel=1e-5, abs=1e-8)


@torch.no_grad()
def difference(
    options: dict[str, Any],
    batch: Batch,
    output: PolicyOutput,
    values: torch.Tensor,
    place: int,
    references: list[float],
    step: float = 1e-6,
) -> float:
    """Slope of the loss by hand with respect to one number."""
    number = values.data.view(-1)
    before = float(number[place])
    losses = []
    for change in (step, -step):
        number[place] = before + change
        losses.append(by_hand(options, batch, output, references)["policy/loss"])
    number[place] = before
    return (losses[0] - losses[1]) / (2 * step)


def one_decision(bench: Any, ratio: float, advantage: float, **options: Any) -> tuple[float, float, dict[str, float]]:
    """Loss, its slope in the log-prob, and metrics, where the critic is right."""
    algorithm = bench.algorithm(**options)
    columns = {"old_logprobs": 0.0, "old_values": 0.0, "value_targets": 0.0, "value_weights": 1.0}
    columns |= {"advantages": advantage, "weights": 1.0, "share": 1.0}
    batch = Batch(
        (bench.episode([(1, 0.0)]),), {name: torch.tensor([v], dtype=torch.float64) for name, v in columns.items()}
    )
    logprobs = torch.tensor([math.log(ratio)], dtype=torch.float64, requires_grad=True)
    zeros = torch.zeros(1, dtype=torch.float64)
    loss = algorithm.loss(batch, PolicyOutput(logprobs, zeros, {"value": zeros[:, None]}))
    loss.total.backward()
    assert logprobs.grad is not None
    return loss.total.item(), float(logprobs.grad), {name: float(value) for name, value in loss.metrics.items()}


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "slope", "clipped"),
    [
        (1.0, 2.0, -2.0, -2.0, 0.0),
        (2.0, -1.0, 2.0, 2.0, 0.0),
        (3.5, -1.0, 3.0, 0.0, 1.0),
        (10.0, -2.0, 6.0, 0.0, 1.0),
        (10.0, 2.0, -2.4, 0.0, 0.0),
        (0.5, -1.0, 0.8, 0.0, 0.0),
    ],
    ids=["on policy", "below", "above", "far above", "positive", "clipped low"],
)
def test_the_dual_clip_bounds_negative_advantages_alone(
    bench: Any, ratio: float, advantage: float, loss: float, slope: float, clipped: float
) -> None:
    found = one_decision(bench, ratio, advantage, dual_clip=3.0)
    assert found[:2] == pytest.approx((loss, slope))
    assert found[2]["policy/dual_clip_fraction"] == clipped


def test_without_a_dual_clip_a_negative_advantage_is_multiplied_by_any_ratio(bench: Any) -> None:
    loss, slope, metrics = one_decision(bench, 10.0, -2.0)
    assert (loss, slope) == pytest.approx((20.0, 20.0))
    assert "policy/dual_clip_fraction" not in metrics


@pytest.mark.parametrize(
    ("value", "loss", "clipped"),
    [(0.1, 0.5 * 0.9**2, 0.0), (0.5, 0.5 * 0.8**2, 1.0), (1.0, 0.5 * 0.8**2, 1.0), (-1.0, 0.5 * 4.0, 0.0)],
    ids=["near", "beyond", "on the target", "away"],
)
def test_a_value_is_not_rewarded_for_moving_further_than_its_clip(
    bench: Any, value: float, loss: float, clipped: float
) -> None:
    """Old value 0, target 1, clip 0.2: moved towards the target, no further than to 0.2 counts."""
    algorithm = bench.algorithm(value_clip=0.2)
    batch = bench.prepared([bench.episode([(1, 1.0)])], bench.policy(values={0: [0.0]}))
    output = PolicyOutput(batch.old_logprobs, torch.zeros(1), {"value": torch.tensor([[value]], dtype=torch.float64)})
    metrics = algorithm.loss(batch, output).metrics
    assert float(metrics["value/loss"]) == pytest.approx(loss)
    assert float(metrics["value/clip_fraction"]) == clipped


def test_a_loss_in_pieces_is_the_loss(bench: Any) -> None:
    episodes = bench.random_episodes(2)
    policy = bench.policy(2)
    algorithm = bench.algorithm(**OPTIONS["everything"])
    [batch] = algorithm.prepare(episodes, policy)
    whole = algorithm.loss(batch, moved(policy.output(episodes)))
    output = moved(policy.output(episodes))
    pieces, place = [], 0
    for trajectory in episodes:
        here = slice(place, place + trajectory.decisions)
        place = here.stop
        piece = Batch((trajectory,), {name: column[here] for name, column in batch.columns.items()})
        cut = PolicyOutput(output.logprobs[here], output.entropies[here], {"value": output.heads["value"][here]})
        pieces.append(algorithm.loss(piece, cut))
    assert len(pieces) == len(episodes) > 1
    assert sum(piece.total.item() for piece in pieces) == pytest.approx(whole.total.item())
    for name, value in whole.metrics.items():
        assert float(sum(piece.metrics[name] for piece in pieces)) == pytest.approx(float(value)), name
