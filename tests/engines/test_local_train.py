"""The local train engine: gradients do not depend on micro-batches, and one step is AdamW's."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from rllava_core.algorithms.config import PolicyGradientConfig
from rllava_core.algorithms.policy_gradient import PolicyGradient, Rollouts
from rllava_core.algorithms.protocol import Batch, Loss
from rllava_core.engines.config import LocalTrainConfig
from rllava_core.engines.local_train import LocalTrainEngine
from rllava_core.errors import ConfigError, TrainingError
from rllava_core.mdp.trajectory import Trajectory
from rllava_core.policy.policy import Head, Policy, PolicyOutput


class Reinforce(PolicyGradient):
    def advantages(self, rollouts: Rollouts) -> Tensor:
        return rollouts.returns - 0.4

    def token_loss(self, batch: Batch, output: PolicyOutput) -> Tensor:
        return -(output.logprobs - batch.old_logprobs).exp().clamp(max=3) * batch.advantages


def prepared(algorithm: PolicyGradient, engine: LocalTrainEngine, trajectories: list[Trajectory]) -> Batch:
    [batch] = algorithm.prepare(trajectories, engine)
    return batch


def gradients(engine: LocalTrainEngine) -> dict[str, Tensor]:
    """What the last step has left."""
    return {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()
        for name, parameter in engine.policy.named_parameters()
    }


def alone(policy: Policy, engine: LocalTrainEngine, trajectories: list[Trajectory]) -> PolicyOutput:
    """Each trajectory in a batch of its own."""
    with torch.no_grad():
        outputs = [policy(engine._pack([trajectory])) for trajectory in trajectories]
    return PolicyOutput(
        torch.cat([output.logprobs for output in outputs]),
        torch.cat([output.entropies for output in outputs]),
        {name: torch.cat([output.heads[name] for output in outputs]) for name in outputs[0].heads},
    )


@pytest.mark.parametrize(
    ("trees", "options", "layout"),
    [
        (True, {}, "shared"),
        (True, {"checkpoint_activations": True}, "packed"),
        (True, {"prefix_sharing": False}, "unshared"),
        (False, {}, "rows"),
        (False, {"checkpoint_activations": True}, "unshared"),
        (False, {"prefix_sharing": False}, "unshared"),
    ],
)
def test_batches_are_laid_out_as_the_model_can_read_them(
    bench: Any, trees: bool, options: dict[str, bool], layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The toy's layers cannot be computed again.
    monkeypatch.setattr(Policy, "recompute", lambda policy, wanted: None)
    policy = bench.policy()
    policy.adapter.takes_trees = trees

    engine = bench.engine(policy, config=LocalTrainConfig(device="cpu", **options))

    assert engine.layout == layout
    batch = engine._pack(bench.trajectories())
    assert batch.packed == (layout in ("packed", "unshared"))
    assert trees or batch.tree_sees is None


@pytest.mark.parametrize("aggregation", ["sequence", "token", "constant"])
def test_gradients_and_metrics_do_not_depend_on_the_micro_batches(bench: Any, aggregation: str) -> None:
    length = 9 if aggregation == "constant" else None
    config = PolicyGradientConfig(
        aggregation=aggregation, aggregation_length=length, entropy_coefficient=0.1, kl_coefficient=0.2
    )
    trajectories = bench.trajectories()
    passes, results = [], []
    for tokens in (1, 50, 10**6):
        engine = bench.engine(copies={"reference": bench.policy(seed=5)}, micro_batch_tokens=tokens)
        algorithm = Reinforce(config)
        batch = prepared(algorithm, engine, trajectories)
        seen: list[int] = []
        engine.policy.register_forward_pre_hook(lambda module, inputs, seen=seen: seen.append(1))
        metrics = engine.step(batch, algorithm.loss, 1e-9)
        passes.append(len(seen))
        results.append((metrics, gradients(engine)))

    assert passes[0] == len(trajectories) > passes[1] > passes[2] == 1
    (expected_metrics, expected), *others = results
    scale = max(float(gradient.norm()) for gradient in expected.values())
    for metrics, found in others:
        assert metrics == pytest.approx(expected_metrics, rel=1e-6)
        for name, gradient in expected.items():
            assert float((found[name] - gradient).norm()) <= 1e-6 * scale, name
    assert {"policy/loss", "policy/entropy", "policy/kl_reference", "policy/grad_norm"} <= set(expected_metrics)


def test_the_gradient_is_that_of_the_whole_loss_trajectory_by_trajectory(bench: Any) -> None:
    """Against one backward pass over a loss summed by hand, on a policy outside the engine."""
    trajectories = bench.trajectories()
    engine = bench.engine(micro_batch_tokens=60)
    algorithm = Reinforce(PolicyGradientConfig(aggregation="sequence"))
    by_hand = bench.policy()
    total = torch.zeros((), dtype=torch.float64)
    for trajectory in trajectories:
        logprobs = by_hand(engine._pack([trajectory])).logprobs
        for logprob, old in zip(logprobs, trajectory.behaviour_logprobs.tolist(), strict=True):
            push = (logprob - old).exp().clamp(max=3) * (trajectory.episode_return - 0.4)
            total = total - push / len(logprobs) / len(trajectories)
    total.backward()

    metrics = engine.step(prepared(algorithm, engine, trajectories), algorithm.loss, 1e-9)

    assert metrics["policy/loss"] == pytest.approx(total.item(), rel=1e-6)
    expected = {name: parameter.grad for name, parameter in by_hand.named_parameters()}
    norm = math.sqrt(sum(float((gradient**2).sum()) for gradient in expected.values()))
    assert metrics["policy/grad_norm"] == pytest.approx(norm, rel=1e-6)
    for name, gradient in gradients(engine).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=1e-6 * norm)


def simple(batch: Batch, output: PolicyOutput) -> Loss:
    total = -(output.logprobs * batch.weights).sum()
    return Loss(total, {"policy/loss": total.detach()})


def weighted(trajectories: list[Trajectory]) -> Batch:
    decisions = sum(trajectory.decisions for trajectory in trajectories)
    return Batch(tuple(trajectories), {"weights": torch.full((decisions,), 1 / decisions)})


def test_steps_are_those_of_adamw(bench: Any) -> None:
    """Arithmetic of arXiv:1711.05101, algorithm 2, with a learning rate that changes from step to step."""
    engine = bench.engine(learning_rate=0.5, weight_decay=0.1, adam_betas=(0.8, 0.95))
    batch = weighted(bench.trajectories())
    before = {name: parameter.detach().clone() for name, parameter in engine.policy.named_parameters()}
    first = dict.fromkeys(before, torch.zeros(()))
    second = dict.fromkeys(before, torch.zeros(()))

    for step, rate in enumerate((1e-2, 3e-3, 2e-2), start=1):
        metrics = engine.step(batch, simple, rate)
        assert metrics["policy/learning_rate"] == rate
        for name, gradient in gradients(engine).items():
            first[name] = 0.8 * first[name] + 0.2 * gradient
            second[name] = 0.95 * second[name] + 0.05 * gradient**2
            move = first[name] / (1 - 0.8**step) / ((second[name] / (1 - 0.95**step)).sqrt() + 1e-8)
            before[name] = before[name] * (1 - rate * 0.1) - rate * move

    for name, parameter in engine.policy.named_parameters():
        torch.testing.assert_close(parameter.detach(), before[name], rtol=0, atol=1e-9, msg=name)


@pytest.mark.parametrize("limit", [1e-3, 1e6])
def test_the_gradient_is_clipped_as_a_whole_and_its_norm_reported_before(bench: Any, limit: float) -> None:
    batch = weighted(bench.trajectories())
    free, bounded = bench.engine(), bench.engine(max_grad_norm=limit, micro_batch_tokens=30)
    expected = free.step(batch, simple, 1e-9)["policy/grad_norm"]

    assert bounded.step(batch, simple, 1e-9)["policy/grad_norm"] == pytest.approx(expected, rel=1e-6)
    factor = min(1.0, limit / expected)
    after = gradients(bounded)
    for name, gradient in gradients(free).items():
        torch.testing.assert_close(after[name], gradient * factor, rtol=1e-5, atol=1e-6 * factor * expected)


def test_learning_raises_the_logprob_of_what_is_rewarded(bench: Any) -> None:
    trajectories = bench.trajectories()
    engine = bench.engine()
    before = engine.evaluate(trajectories).logprobs.mean()

    for _ in range(5):
        engine.step(weighted(trajectories), simple, 1e-2)

    assert engine.evaluate(trajectories).logprobs.mean() > before + 0.5


def snapshot(engine: LocalTrainEngine) -> dict[str, Tensor]:
    return {name: values.clone() for name, values in engine.policy.state_dict().items()}


def broken_loss(batch: Batch, output: PolicyOutput) -> Loss:
    total = output.logprobs.sum() * math.nan
    return Loss(total, {})


def broken_gradient(batch: Batch, output: PolicyOutput) -> Loss:
    """Finite, but with the infinite slope of a square root at zero."""
    return Loss((output.logprobs - output.logprobs.detach()).abs().sqrt().sum(), {})


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (broken_loss, "the loss became nan on .*example 0"),
        (broken_gradient, "gradient became non-finite on .*example 0"),
    ],
)
def test_a_step_that_is_not_finite_is_refused_and_leaves_no_trace(bench: Any, loss: Any, message: str) -> None:
    batch = weighted(bench.trajectories())
    engine, healthy = bench.engine(micro_batch_tokens=50), bench.engine(micro_batch_tokens=50)
    for one in (engine, healthy):
        one.step(batch, simple, 1e-2)
    before = snapshot(engine)

    with pytest.raises(TrainingError, match=message):
        engine.step(batch, loss, 1e-2)

    assert all(torch.equal(before[name], values) for name, values in snapshot(engine).items())
    for one in (engine, healthy):
        one.step(batch, simple, 1e-2)
    expected = snapshot(healthy)
    assert all(torch.equal(expected[name], values) for name, values in snapshot(engine).items())


@pytest.mark.parametrize("tokens", [1, 50, 10**6])
def test_evaluate_gives_all_decisions_in_order_without_gradients(bench: Any, tokens: int) -> None:
    policy = bench.policy(heads={"value": Head(2)})
    engine = bench.engine(policy, micro_batch_tokens=tokens)
    trajectories = bench.trajectories()
    expected = alone(policy, engine, trajectories)

    output = engine.evaluate(trajectories)

    for found, values in (
        (output.logprobs, expected.logprobs),
        (output.entropies, expected.entropies),
        (output.heads["value"], expected.heads["value"]),
    ):
        assert found.dtype == torch.float32
        assert not found.requires_grad
        torch.testing.assert_close(found, values.float(), rtol=0, atol=1e-6)


def test_the_reference_stays_what_it_was_while_the_policy_learns(bench: Any) -> None:
    trajectories = bench.trajectories()
    reference = bench.policy()
    engine = bench.engine(copies={"reference": reference})
    before = engine.evaluate(trajectories, "reference").logprobs
    assert torch.equal(before, engine.evaluate(trajectories).logprobs)

    engine.step(weighted(trajectories), simple, 1e-2)

    assert torch.equal(engine.evaluate(trajectories, "reference").logprobs, before)
    assert (engine.evaluate(trajectories).logprobs - before).abs().max() > 1e-3
    assert not any(parameter.requires_grad for parameter in reference.parameters())


def test_an_engine_goes_on_exactly_where_its_state_was_taken(bench: Any) -> None:
    batch = weighted(bench.trajectories())
    first = bench.engine(weight_decay=0.1)
    first.step(batch, simple, 1e-2)
    weights, state = copy.deepcopy(first.policy.state_dict()), copy.deepcopy(first.state_dict())
    second = bench.engine(weight_decay=0.1)
    second.policy.load_state_dict(weights)
    second.load_state_dict(state)

    for engine in (first, second):
        engine.step(batch, simple, 5e-3)

    expected = snapshot(first)
    assert all(torch.equal(expected[name], values) for name, values in snapshot(second).items())


def test_dropout_is_off_while_training(bench: Any) -> None:
    engine = bench.engine(bench.policy().train())
    assert not any(module.training for module in engine.policy.modules())


def test_the_policy_of_the_engine_is_the_one_it_was_given(bench: Any) -> None:
    policy = bench.policy()
    assert bench.engine(policy).policy is policy


def test_forward_passes_may_be_in_bfloat16_over_float32_weights(bench: Any) -> None:
    trajectories = bench.trajectories()
    exact = bench.engine(bench.policy(precise=False)).evaluate(trajectories)
    bench.forget_the_precision()
    config = LocalTrainConfig(device="cpu", mixed_precision="bf16")
    engine = bench.engine(bench.policy(precise=False), {"reference": bench.policy(precise=False)}, config)

    rounded = engine.evaluate(trajectories)
    gap = (rounded.logprobs - exact.logprobs).abs()
    assert 1e-5 < gap.mean() < 0.05
    assert rounded.logprobs.dtype == torch.float32
    # Or the divergence from the reference would begin with rounding errors.
    assert torch.equal(engine.evaluate(trajectories, "reference").logprobs, rounded.logprobs)
    metrics = engine.step(weighted(trajectories), simple, 1e-3)
    assert metrics["policy/loss"] == pytest.approx(-float(exact.logprobs.mean()), abs=0.05)
    assert all(parameter.dtype == torch.float32 for parameter in engine.policy.parameters())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there_is_a_mistake_of_the_config(bench: Any) -> None:
    with pytest.raises(ConfigError, match=r"engine\.train\.device is cuda"):
        bench.engine(config=LocalTrainConfig(device="cuda"))
