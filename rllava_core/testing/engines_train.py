"""Checks of engines that train."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from rllava_core.algorithms.protocol import Batch, Loss, LossFunction
from rllava_core.errors import TrainingError
from rllava_core.policy.policy import Head, Policy, PolicyOutput
from rllava_core.testing.conformance import ConformanceError, require
from rllava_core.testing.engines_base import (
    EngineSuite,
    imitation,
    moved,
    recomputed,
    same_weights,
    through_a_file,
    weighted,
    weights_of,
)
from rllava_core.testing.rollouts import pack

RATE = 1e-2

SAME_MOVE = 1e-2
"""Share of a step by which two ways to compute it may differ. AdamW divides every gradient by its own size, so of a
gradient that is all but zero it also magnifies the rounding; a wrong scale or a missing part shows from 0.1 on."""


class TrainChecks(EngineSuite):
    """The half of the suite for engines that provide `train`."""

    def test_the_policy_is_the_one_that_was_given_and_is_not_wrapped(self) -> None:
        """The run saves the policy that it gave to the engine, and samples from the engine's."""
        policy = self.policy()
        engine = self.trainer(policy)
        require(
            engine.policy is policy,
            f"engine.policy is {type(engine.policy).__name__}, not the Policy of the setup: checkpoints would hold the "
            "weights that training began with",
        )

    def test_it_says_how_batches_are_laid_out(self) -> None:
        layout = getattr(self.trainer(), "layout", None)
        require(isinstance(layout, str) and layout, f"layout is {layout!r}; `manifest.json` holds a word for it")

    def test_a_step_changes_the_weights_and_reports_what_the_loss_does(self) -> None:
        engine = self.trainer()
        before = weights_of(engine.policy)
        batch = weighted(self.trajectories())
        metrics = engine.step(batch, imitation, RATE)
        require(moved(before, weights_of(engine.policy)) > 0, "a step left the weights of engine.policy as they were")
        require(
            isinstance(metrics, dict) and all(isinstance(value, float) for value in metrics.values()),
            f"step() returned {metrics!r}; expected floats by name",
        )
        missing = {"conformance/loss", "conformance/decisions"} - set(metrics)
        require(not missing, f"step() does not return the loss's own metrics {', '.join(sorted(missing))}")
        after = engine.evaluate(batch.trajectories).logprobs.mean()
        first = recomputed(self.policy(), batch.trajectories).logprobs.mean()
        require(after > first, f"a step on −log-probs lowered the mean log-prob from {first:.4f} to {after:.4f}")

    def test_every_trajectory_is_learnt_from_once_and_metrics_are_summed(self) -> None:
        batch = weighted(self.trajectories())
        engine = self.trainer(micro_batch_tokens=40)
        seen: list[Batch] = []

        def spying(micro: Batch, output: PolicyOutput) -> Loss:
            seen.append(micro)
            return imitation(micro, output)

        metrics = engine.step(batch, spying, RATE)
        names = [id(trajectory) for micro in seen for trajectory in micro.trajectories]
        require(
            names == [id(trajectory) for trajectory in batch.trajectories],
            f"the loss saw {len(names)} trajectories of a batch of {len(batch.trajectories)}; expected each once, in "
            "order",
        )
        large = [len(list(micro.split(40))) for micro in seen if len(list(micro.split(40))) > 1]
        require(not large, "a micro-batch is larger than micro_batch_tokens allows: memory would not be bounded")
        total = sum(trajectory.decisions for trajectory in batch.trajectories)
        counted = metrics.get("conformance/decisions")
        require(counted == total, f"a metric that counts decisions is {counted} for {total}: metrics are sums")

    def test_a_step_does_not_depend_on_the_micro_batches(self) -> None:
        """Two steps of unlike size: AdamW hides a wrong scale that is the same in every step."""
        trajectories = self.trajectories()
        results = []
        for tokens in (10**6, 40):
            engine = self.trainer(micro_batch_tokens=tokens)
            before = weights_of(engine.policy)
            for part in (trajectories, trajectories[:2], trajectories[3:9]):
                metrics = engine.step(weighted(part), imitation, RATE)
            results.append((metrics, weights_of(engine.policy)))
        (metrics, whole), (others, cut) = results
        difference = moved(whole, cut) / moved(before, whole)
        require(
            difference <= SAME_MOVE,
            f"steps in micro-batches differ from whole ones by {difference:.2g} of what they moved: add up the "
            "gradients of the micro-batches, and do not divide by their number",
        )
        for name, value in metrics.items():
            require(
                abs(others.get(name, math.nan) - value) <= SAME_MOVE * max(1.0, abs(value)),
                f"metric {name!r} is {value:.5g} of a whole batch, {others.get(name)} of its micro-batches",
            )

    def test_what_is_learnt_from_is_what_the_policy_says(self) -> None:
        """No dropout, no other order, heads included."""
        policy = self.policy(heads={"value": Head(2)}).train()
        modules: list[Any] = list(policy.modules())
        for module in modules:
            if hasattr(module, "attention_dropout"):
                module.attention_dropout = 0.5
        engine = self.trainer(policy, micro_batch_tokens=60)
        batch = weighted(self.trajectories())
        outputs: list[PolicyOutput] = []

        def spying(micro: Batch, output: PolicyOutput) -> Loss:
            outputs.append(output)
            return imitation(micro, output)

        # States that episodes were left in are read where the policy is evaluated, not for a loss.
        expected = replace(recomputed(copy.deepcopy(engine.policy).eval(), batch.trajectories), final={})
        engine.step(batch, spying, RATE)
        attached = all(output.logprobs.requires_grad for output in outputs)
        require(attached, "the loss is given log-probs without a gradient")
        self._require_equal(_joined(outputs), expected, "the loss is given")

    def test_a_loss_that_is_not_finite_is_refused_and_leaves_no_trace(self) -> None:
        def broken(micro: Batch, output: PolicyOutput) -> Loss:
            result = imitation(micro, output)
            # The first micro-batches are sound, so that their gradients are there when the last one fails.
            spoilt = math.nan if micro.trajectories[-1] is batch.trajectories[-1] else 1.0
            return Loss(result.total * spoilt, result.metrics)

        batch = weighted(self.trajectories())
        self._require_refused(batch, broken, "a loss that is NaN")

    def test_a_gradient_that_is_not_finite_is_refused_and_leaves_no_trace(self) -> None:
        def broken(micro: Batch, output: PolicyOutput) -> Loss:
            # Finite, but with the infinite slope of a square root at zero.
            return Loss((output.logprobs - output.logprobs.detach()).abs().sqrt().sum(), {})

        self._require_refused(weighted(self.trajectories()), broken, "a gradient that is not finite")

    def test_the_learning_rate_of_each_step_is_honoured(self) -> None:
        batch = weighted(self.trajectories())
        moves = []
        for rate in (0.0, 1e-4, 1e-2):
            engine = self.trainer(learning_rate=0.3)
            before = weights_of(engine.policy)
            engine.step(batch, imitation, rate)
            moves.append(moved(before, weights_of(engine.policy)))
        require(moves[0] == 0, "a step with learning rate 0 changed the weights")
        # AdamW's first step is proportional to the rate; float32 weights round steps of 1e-4 by up to a percent.
        require(
            90 <= moves[2] / moves[1] <= 110 if moves[1] else False,
            f"a step with learning rate 1e-4 moved the weights by {moves[1]:.3g}, one with 1e-2 by {moves[2]:.3g}; "
            "expected a hundred times as far",
        )

    def test_the_gradient_is_limited_to_max_grad_norm(self) -> None:
        """A limited step is a free one on a loss that is as much smaller. A second, small step shows the difference:
        AdamW hides a scale that is the same in every step."""
        batch, small = weighted(self.trajectories()), weighted(self.trajectories()[:2])
        limit = 0.05 * _gradient_norm(self.policy(), batch)

        def scaled(factor: float) -> LossFunction:
            def loss(micro: Batch, output: PolicyOutput) -> Loss:
                result = imitation(micro, output)
                return Loss(factor * result.total, result.metrics)

            return loss

        results = {}
        for name, maximum, factor in (("limited", limit, 1.0), ("scaled", None, 0.05), ("free", None, 1.0)):
            engine = self.trainer(max_grad_norm=maximum)
            before = weights_of(engine.policy)
            engine.step(batch, scaled(factor), RATE)
            engine.step(small, scaled(1e-2), RATE)
            results[name] = weights_of(engine.policy)
        far = moved(before, results["free"])
        require(
            moved(results["limited"], results["scaled"]) <= SAME_MOVE * far,
            "with max_grad_norm the steps are not those of a gradient that is scaled down, as a whole, to that norm",
        )

    def test_evaluate_is_what_the_policy_says(self) -> None:
        policy = self.policy(heads={"value": Head(2)})
        engine = self.trainer(policy, micro_batch_tokens=60)
        trajectories = self.trajectories()
        output = engine.evaluate(trajectories)
        self._require_equal(output, recomputed(engine.policy, trajectories), "evaluate() gives")
        for name, values in _tensors(output).items():
            require(values.device.type == "cpu", f"evaluate() gives {name} on {values.device}; expected the CPU")
            require(not values.requires_grad, f"evaluate() gives {name} with a graph, which would hold its memory")

    def test_a_copy_stays_what_it_was_until_it_is_updated(self) -> None:
        trajectories = self.trajectories()
        policy = self.policy(heads={"value": Head(2)})
        other = self.policy(5, {"value": Head(2)})
        expected = recomputed(other, trajectories)
        engine = self.trainer(policy, {"target": other})
        self._require_equal(engine.evaluate(trajectories, "target"), expected, "evaluate() gives, of a copy,")
        for _ in range(2):
            engine.step(weighted(trajectories), imitation, RATE)
        self._require_equal(engine.evaluate(trajectories, "target"), expected, "after steps a copy gives")
        mixed = self.policy(5, {"value": Head(2)})
        with torch.no_grad():
            for own, new in zip(mixed.parameters(), engine.policy.parameters(), strict=True):
                own.mul_(0.75).add_(new.detach().to(own.device), alpha=0.25)
        engine.update_copy("target", 0.25)
        after = recomputed(mixed, trajectories)
        self._require_equal(engine.evaluate(trajectories, "target"), after, "after update_copy(…, 0.25) a copy gives")
        engine.update_copy("target")
        now = engine.evaluate(trajectories)
        self._require_equal(engine.evaluate(trajectories, "target"), now, "after update_copy() a copy gives")

    def test_copies_go_on_where_their_state_was_saved(self) -> None:
        trajectories = self.trajectories()
        first = self.trainer(self.policy(), {"target": self.policy(5), "reference": self.policy(6)})
        first.step(weighted(trajectories), imitation, RATE)
        first.update_copy("target", 0.5)
        state = through_a_file(first.state_dict())
        second = self.trainer(self.policy(), {"target": self.policy(5), "reference": self.policy(6)})
        second.policy.load_state_dict(weights_of(first.policy))
        second.load_state_dict(state)
        for name in ("target", "reference"):
            expected = first.evaluate(trajectories, name)
            what = f"after state_dict() was saved and loaded the copy {name!r} gives"
            self._require_equal(second.evaluate(trajectories, name), expected, what)

    def test_an_engine_goes_on_exactly_where_its_state_was_saved(self) -> None:
        trajectories = self.trajectories()
        first = self.trainer(weight_decay=0.1)
        for part in (trajectories, trajectories[:2]):
            first.step(weighted(part), imitation, RATE)
        state = through_a_file(first.state_dict())
        policy = self.policy(seed=1)
        policy.load_state_dict(weights_of(first.policy))
        second = self.trainer(policy, weight_decay=0.1)
        second.load_state_dict(state)
        for engine in (first, second):
            engine.step(weighted(trajectories[2:]), imitation, RATE)
        require(
            same_weights(weights_of(first.policy), weights_of(second.policy)),
            "a step after state_dict() was saved and loaded differs from that of the engine it was taken of: a resumed "
            "run would not be the run that was interrupted",
        )

    def test_autocast_is_a_context_to_sample_in(self) -> None:
        engine = self.trainer()
        trajectories = self.trajectories()
        for _ in range(2):
            context = engine.autocast()
            require(
                hasattr(context, "__enter__") and hasattr(context, "__exit__"),
                f"autocast() gave {type(context).__name__}; expected a context manager",
            )
            with context:
                output = recomputed(engine.policy, trajectories)
        self._require_equal(output, engine.evaluate(trajectories), "within autocast() the policy gives")

    def _require_refused(self, batch: Batch, broken: LossFunction, what: str) -> None:
        """TrainingError, weights untouched, and the next step as if nothing had been."""
        spoilt, healthy = (self.trainer(micro_batch_tokens=60) for _ in range(2))
        for engine in (spoilt, healthy):
            engine.step(batch, imitation, RATE)
        before = weights_of(spoilt.policy)
        try:
            spoilt.step(batch, broken, RATE)
        except TrainingError:
            pass
        except Exception as error:
            raise ConformanceError(
                f"{what} raised {type(error).__name__}: {error}; expected a TrainingError"
            ) from error
        else:
            require(False, f"{what} was accepted; expected a TrainingError")
        require(same_weights(before, weights_of(spoilt.policy)), f"{what} was refused, but the weights have changed")
        for engine in (spoilt, healthy):
            engine.step(batch, imitation, RATE)
        difference = moved(weights_of(healthy.policy), weights_of(spoilt.policy))
        require(
            difference <= SAME_MOVE * moved(before, weights_of(healthy.policy)),
            f"after {what} was refused, the next step differs: its gradients were kept",
        )

    def _require_equal(self, found: PolicyOutput, expected: PolicyOutput, what: str) -> None:
        others = _tensors(found)
        for name, values in _tensors(expected).items():
            other = others.get(name)
            shape = None if other is None else tuple(other.shape)
            require(shape == tuple(values.shape), f"{what} {name} of shape {shape}; expected {tuple(values.shape)}")
            assert other is not None
            gap = float((other.detach().cpu() - values).abs().max())
            require(
                gap <= self.tolerance,
                f"{what} {name} that differ from Policy.forward by {gap:.2g}: other weights, or another order",
            )


def _tensors(output: PolicyOutput) -> dict[str, Tensor]:
    heads = {f"head {name!r}": values for name, values in output.heads.items()}
    final = {f"head {name!r} in final states": values for name, values in output.final.items()}
    return {"log-probs": output.logprobs, "entropies": output.entropies, **heads, **final}


def _joined(outputs: list[PolicyOutput]) -> PolicyOutput:
    return PolicyOutput(
        torch.cat([output.logprobs for output in outputs]),
        torch.cat([output.entropies for output in outputs]),
        {name: torch.cat([output.heads[name] for output in outputs]) for name in outputs[0].heads},
    )


def _gradient_norm(policy: Policy, batch: Batch) -> float:
    imitation(batch, policy(pack(policy, batch.trajectories))).total.backward()
    squares = [float(item.grad.double().square().sum()) for item in policy.parameters() if item.grad is not None]
    return math.sqrt(sum(squares))
