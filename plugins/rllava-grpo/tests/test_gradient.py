"""The gradient of GRPO with respect to the weights is that of the papers' equations."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from rllava_grpo.algorithm import GRPO
from rllava_grpo.config import GRPOConfig

TOLERANCE = 1e-5

OPTIONS: dict[str, dict[str, Any]] = {
    "sequence": {},
    "token": {"aggregation": "token"},
    "constant": {"aggregation": "constant", "aggregation_length": 11},
    "batch_scale": {"scale": "batch"},
    "no_scale": {"scale": "none"},
    "large_epsilon": {"epsilon": 0.5},
    "clip_higher": {"clip_low": 0.1, "clip_high": 0.35},
    "entropy_bonus": {"entropy_coefficient": 0.05},
    "k2_in_loss": {"kl_coefficient": 0.3, "kl_estimator": "k2"},
    "k3_in_loss": {"kl_coefficient": 0.3, "kl_estimator": "k3"},
    "k1_in_reward": {"kl_coefficient": 0.2, "kl_estimator": "k1", "kl_in": "reward"},
    "k2_in_reward": {"kl_coefficient": 0.2, "kl_estimator": "k2", "kl_in": "reward"},
    "k3_in_reward": {"kl_coefficient": 0.2, "kl_estimator": "k3", "kl_in": "reward"},
    "dapo": {"aggregation": "token", "clip_low": 0.2, "clip_high": 0.28},
    "dr_grpo": {"aggregation": "constant", "aggregation_length": 16, "scale": "none"},
    "everything": {
        "aggregation": "token",
        "scale": "batch",
        "clip_low": 0.15,
        "clip_high": 0.3,
        "entropy_coefficient": -0.02,
        "kl_coefficient": 0.1,
    },
}


def gradients(model: Any) -> dict[str, torch.Tensor]:
    return {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()
        for name, parameter in model.named_parameters()
    }


def assert_same_gradient(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """To 1e-5 of the largest entry of each parameter's gradient."""
    assert set(found) == set(expected)
    for name, gradient in expected.items():
        assert float((found[name] - gradient).abs().max()) <= TOLERANCE * float(gradient.abs().max()), name


@pytest.mark.parametrize("kind", ["text", "choices"])
@pytest.mark.parametrize("name", OPTIONS)
def test_the_gradient_equals_the_equation_decision_by_decision(bench: Any, name: str, kind: str) -> None:
    options = OPTIONS[name]
    policy = bench.policy()
    reference = bench.perturbed(policy)
    trajectories = bench.trajectories(policy, kind)
    by_hand = copy.deepcopy(policy.model)
    expected = bench.objective(options, trajectories, trajectories, by_hand, reference.model)
    expected.loss.backward()
    # Or the test would say nothing of the clipping.
    assert expected.clipped_low > 0
    assert expected.clipped_high > 0
    assert expected.clipped_low + expected.clipped_high < expected.decisions

    algorithm = GRPO(GRPOConfig(group_size=3, **options))
    engine = bench.engine(policy, reference if algorithm.copies else None)
    [batch] = algorithm.prepare(trajectories, engine)
    metrics = engine.step(batch, algorithm.loss, 1e-9)

    assert metrics["policy/loss"] == pytest.approx(expected.loss.item(), rel=1e-5, abs=1e-7)
    assert_same_gradient(gradients(policy.model), gradients(by_hand))
    assert all(gradient.any() for gradient in gradients(by_hand).values())
    assert metrics["policy/clip_fraction_low"] == pytest.approx(expected.clipped_low / expected.decisions)
    assert metrics["policy/clip_fraction_high"] == pytest.approx(expected.clipped_high / expected.decisions)
    assert metrics["policy/ratio"] == pytest.approx(expected.ratio, rel=1e-5)


@pytest.mark.parametrize("options", [OPTIONS["sequence"], OPTIONS["everything"], OPTIONS["k1_in_reward"]])
def test_every_minibatch_of_every_epoch_has_the_equation_s_gradient(bench: Any, options: dict[str, Any]) -> None:
    """The weights move between them, so ratios are to the policy that sampled and not to the one before the step."""
    policy = bench.policy()
    reference = bench.perturbed(policy)
    trajectories = bench.trajectories(policy, "text")
    algorithm = GRPO(GRPOConfig(group_size=3, epochs=2, minibatches=2, **options))
    engine = bench.engine(policy, reference if algorithm.copies else None)
    ratios = []

    for batch in algorithm.prepare(trajectories, engine):
        by_hand = copy.deepcopy(policy.model)
        by_hand.zero_grad()
        expected = bench.objective(options, trajectories, batch.trajectories, by_hand, reference.model)
        expected.loss.backward()
        metrics = engine.step(batch, algorithm.loss, 2e-3)
        assert metrics["policy/loss"] == pytest.approx(expected.loss.item(), rel=1e-5, abs=1e-7)
        assert_same_gradient(gradients(policy.model), gradients(by_hand))
        ratios.append(expected.ratio)

    assert len(ratios) == 4
    assert len({round(ratio, 4) for ratio in ratios}) == 4


@pytest.mark.parametrize("kind", ["text", "choices"])
@pytest.mark.parametrize("name", ["sequence", "everything", "k3_in_loss"])
def test_the_gradient_equals_finite_differences(bench: Any, name: str, kind: str) -> None:
    options = OPTIONS[name]
    policy = bench.policy()
    reference = bench.perturbed(policy)
    trajectories = bench.trajectories(policy, kind)
    by_hand = copy.deepcopy(policy.model)
    algorithm = GRPO(GRPOConfig(group_size=3, **options))
    engine = bench.engine(policy, reference if algorithm.copies else None)
    [batch] = algorithm.prepare(trajectories, engine)
    engine.step(batch, algorithm.loss, 1e-9)
    found = gradients(policy.model)

    @torch.no_grad()
    def loss_with(parameter: torch.Tensor, place: tuple[int, ...], change: float) -> float:
        before = parameter[place].item()
        parameter[place] = before + change
        value = bench.objective(options, trajectories, trajectories, by_hand, reference.model).loss.item()
        parameter[place] = before
        return float(value)

    parameters = dict(by_hand.named_parameters())
    for layer in (
        "lm_head.weight",
        "vision.weight",
        "backbone.layers.0.self_attn.k_proj.weight",
        "backbone.layers.1.mlp.up_proj.weight",
        "backbone.norm.weight",
    ):
        place = tuple(int(i) for i in torch.unravel_index(found[layer].abs().argmax(), found[layer].shape))
        step = 1e-5
        slope = (loss_with(parameters[layer], place, step) - loss_with(parameters[layer], place, -step)) / (2 * step)
        assert found[layer][place].item() == pytest.approx(slope, rel=TOLERANCE), layer


def test_a_decision_that_is_clipped_has_no_gradient(bench: Any) -> None:
    """One group whose every decision is pushed further than the bound."""
    policy = bench.policy()
    trajectories = bench.trajectories(policy, "choices")[3:6]
    algorithm = GRPO(GRPOConfig(group_size=3, clip_low=0.0, clip_high=0.0))
    engine = bench.engine(policy, None)
    [batch] = algorithm.prepare(trajectories, engine)
    current = engine.evaluate(trajectories).logprobs
    sign = batch.advantages.sign()
    moved = type(batch)(batch.trajectories, {**batch.columns, "old_logprobs": current - 0.3 * sign})

    metrics = engine.step(moved, algorithm.loss, 1e-9)

    assert metrics["policy/grad_norm"] == 0
    assert metrics["policy/clip_fraction_low"] + metrics["policy/clip_fraction_high"] == pytest.approx(1)


def test_on_the_policy_that_sampled_the_gradient_is_reinforce_with_the_advantages(bench: Any) -> None:
    """At a ratio of one, ∇ρ = ∇log π and nothing is clipped."""
    policy = bench.policy()
    trajectories = bench.trajectories(policy, "text")
    algorithm = GRPO(GRPOConfig(group_size=3))
    engine = bench.engine(policy, None)
    [batch] = algorithm.prepare(trajectories, engine)
    exact = torch.cat([torch.stack(bench.decisions(policy.model, one)[0]).detach() for one in trajectories])
    sampled = type(batch)(batch.trajectories, {**batch.columns, "old_logprobs": exact})
    by_hand = copy.deepcopy(policy.model)
    loss = torch.zeros((), dtype=torch.float64)
    place = 0
    for trajectory in trajectories:
        for logprob in bench.decisions(by_hand, trajectory)[0]:
            loss = loss - batch.advantages[place].double() * logprob / trajectory.decisions / len(trajectories)
            place += 1
    loss.backward()

    metrics = engine.step(sampled, algorithm.loss, 1e-9)

    assert metrics["policy/ratio"] == pytest.approx(1.0)
    assert metrics["policy/clip_fraction_low"] == metrics["policy/clip_fraction_high"] == 0
    assert_same_gradient(gradients(policy.model), gradients(by_hand))
