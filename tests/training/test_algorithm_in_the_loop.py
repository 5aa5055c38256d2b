"""What an algorithm may do between the steps, and what of it is compared with what was sampled."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pytest
from torch import Tensor

from rllava_core.algorithms.protocol import PolicyAccess
from rllava_core.mdp.trajectory import Trajectory
from rllava_core.policy.behaviour import Behaviour
from rllava_core.policy.checks import Gaps
from rllava_core.training import loop
from rllava_core.training.episodes import Episodes
from rllava_toy.algorithm import ToyCritic, ToyGradient

Run = Callable[..., dict[str, Any]]
Logged = Callable[[], list[dict[str, Any]]]


def test_evaluations_act_as_the_algorithm_says(run_toy: Run, watcher: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def last_choice(heads: Mapping[str, Tensor]) -> Tensor:
        return heads["value"].new_tensor([0.0, 0.0, 1.0]).expand(len(heads["value"]), 3)

    monkeypatch.setattr(ToyCritic, "behaviour", lambda self: Behaviour(last_choice))
    run_toy("algorithm=toy_critic", "training.steps=1")

    for evaluation in watcher.evaluations.values():
        assert {action.choice for item in evaluation.trajectories for action in item.actions} == {2}
    assert set(watcher.evaluations) == {0, 1}


Prepare = Callable[[ToyGradient, Sequence[Trajectory], PolicyAccess], Any]


def test_a_generator_is_sent_the_metrics_of_each_step(
    run_toy: Run, logged: Logged, monkeypatch: pytest.MonkeyPatch
) -> None:
    original: Prepare = ToyGradient.prepare
    sent: list[Mapping[str, float]] = []

    def prepare(self: ToyGradient, trajectories: Sequence[Trajectory], policy: PolicyAccess) -> Any:
        for batch in original(self, trajectories, policy):
            sent.append((yield batch))

    monkeypatch.setattr(ToyGradient, "prepare", prepare)
    run_toy("training.steps=2", "algorithm.epochs=3")

    assert len(sent) == 6
    for number, line in enumerate(logged()[1:]):
        own = sent[3 * number : 3 * number + 3]
        assert line["policy/updates"] == 3
        for name in ("policy/loss", "policy/grad_norm"):
            assert line[name] == pytest.approx(np.mean([update[name] for update in own]))


def test_an_algorithm_may_leave_the_remaining_batches_out(
    run_toy: Run, logged: Logged, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ToyGradient, "stops", lambda self, metrics: metrics["policy/grad_norm"] > 0)
    run_toy("training.steps=2", "algorithm.epochs=3")

    assert [line["policy/updates"] for line in logged()[1:]] == [1, 1]


def test_a_prepare_that_is_no_generator_will_do(run_toy: Run, logged: Logged, monkeypatch: pytest.MonkeyPatch) -> None:
    original: Prepare = ToyGradient.prepare
    monkeypatch.setattr(ToyGradient, "prepare", lambda *given: list(original(*given)))
    run_toy("training.steps=2", "algorithm.epochs=3")

    assert [line["policy/updates"] for line in logged()[1:]] == [3, 3]


def test_a_step_may_be_without_an_update(run_toy: Run, logged: Logged, monkeypatch: pytest.MonkeyPatch) -> None:
    """While experience is still being collected."""
    original: Prepare = ToyGradient.prepare
    calls: list[int] = []

    def prepare(self: ToyGradient, trajectories: Sequence[Trajectory], policy: PolicyAccess) -> Any:
        calls.append(1)
        return original(self, trajectories, policy) if len(calls) > 2 else iter(())

    monkeypatch.setattr(ToyGradient, "prepare", prepare)
    summary = run_toy("training.steps=3")

    assert summary["status"] == "completed"
    lines = logged()[1:]
    assert [line["policy/updates"] for line in lines] == [0, 0, 1]
    assert ["policy/loss" in line for line in lines] == [False, False, True]


def test_what_an_algorithm_reports_is_logged(run_toy: Run, logged: Logged, monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked after the last step of the iteration."""
    monkeypatch.setattr(ToyGradient, "report", lambda self: {"toy/running": float(self.running)})
    original: Prepare = ToyGradient.prepare
    running: list[float] = []

    def prepare(self: ToyGradient, trajectories: Sequence[Trajectory], policy: PolicyAccess) -> Any:
        yield from original(self, trajectories, policy)
        running.append(float(self.running))

    monkeypatch.setattr(ToyGradient, "prepare", prepare)
    run_toy("training.steps=2")

    first, *lines = logged()
    assert "toy/running" not in first
    assert [line["toy/running"] for line in lines] == pytest.approx(running)


def test_only_what_the_policy_has_just_sampled_is_compared_with_it(
    run_toy: Run, logged: Logged, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is drawn from a replay was sampled by a policy that is no more."""
    original: Prepare = ToyGradient.prepare
    replay: list[Trajectory] = []

    def prepare(self: ToyGradient, trajectories: Sequence[Trajectory], policy: PolicyAccess) -> Any:
        replay.extend(trajectories)
        yield from original(self, {16: replay, 32: replay[:16], 48: replay[12:]}[len(replay)], policy)

    checked: list[int] = []
    check = loop.check_recomputed

    def counting(trajectories: Sequence[Trajectory], *others: Any) -> Gaps:
        checked.append(len(trajectories))
        return check(trajectories, *others)

    monkeypatch.setattr(ToyGradient, "prepare", prepare)
    monkeypatch.setattr(loop, "check_recomputed", counting)
    # With this learning rate the old log-probs are far away from the new ones.
    run_toy("training.steps=3", "training.learning_rate=0.1", "training.max_logprob_gap=1.0e-3")

    lines = logged()[1:]
    assert checked == [16, 16]  # all of the first step, none of the second, and 16 of 36 of the third
    assert ["policy/logprob_gap" in line for line in lines] == [True, False, True]
    assert lines[2]["policy/logprob_gap"] < 1e-3


@pytest.mark.parametrize("tokens", [1, 50, 10**6])
def test_the_gap_is_a_mean_over_what_was_compared_however_the_batch_is_cut(
    run_toy: Run, logged: Logged, monkeypatch: pytest.MonkeyPatch, tokens: int
) -> None:
    original: Prepare = ToyGradient.prepare
    replay: list[Trajectory] = []

    def prepare(self: ToyGradient, trajectories: Sequence[Trajectory], policy: PolicyAccess) -> Any:
        replay.extend(trajectories)
        yield from original(self, replay, policy)

    monkeypatch.setattr(ToyGradient, "prepare", prepare)
    monkeypatch.setattr(loop, "check_recomputed", lambda *given: Gaps(0.25, 0.5, 1.3))
    run_toy("training.steps=2", f"training.micro_batch_tokens={tokens}")

    assert [line["policy/logprob_gap"] for line in logged()[1:]] == pytest.approx([0.25, 0.25])


def test_the_second_update_of_a_step_is_not_compared(run_toy: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    checked: list[int] = []
    check = loop.check_recomputed
    monkeypatch.setattr(loop, "check_recomputed", lambda *given: checked.append(1) or check(*given))
    run_toy("training.steps=2", "algorithm.epochs=3")

    assert len(checked) == 2


def test_a_policy_that_explores_is_not_compared_with_what_it_says(
    run_toy: Run, logged: Logged, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Behaviour | None] = []
    original = Episodes.play

    def watched(self: Episodes, starts: Any, group_size: int, seed: int | None, behaviour: Any = None) -> Any:
        asked.append(behaviour)
        return original(self, starts, group_size, seed, behaviour)

    monkeypatch.setattr(Episodes, "play", watched)
    exploring = Behaviour(epsilon=0.5)
    monkeypatch.setattr(ToyGradient, "behaviour", lambda self: exploring)
    run_toy("training.steps=2", "training.eval_every=0", "training.max_logprob_gap=1.0e-6")

    assert not [line for line in logged() if "policy/logprob_gap" in line]
    # Evaluations do not explore.
    assert asked == [Behaviour(), exploring, exploring, Behaviour()]
