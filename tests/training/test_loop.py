"""The loop: what it measures, evaluates, saves and tells, and in which order."""

from __future__ import annotations

import json
import re
import shutil
import signal
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import Tensor

from rllava_core.algorithms.protocol import PolicyAccess
from rllava_core.errors import ConfigError, DataError, InvariantError, RewardError, TrainingError
from rllava_core.mdp.environment import Failure, Start
from rllava_core.mdp.messages import Action, Observation, Transition
from rllava_core.mdp.trajectory import ActionSegment, ContextSegment, Trajectory, Truncation, Turn
from rllava_core.policy.behaviour import Behaviour
from rllava_core.training import build, loop
from rllava_core.training.build import Task
from rllava_core.training.episodes import Episodes, Limits
from rllava_core.training.evaluation import Evaluation
from rllava_core.training.metrics import describe
from rllava_toy.algorithm import ToyCritic, ToyGradient

Run = Callable[..., dict[str, Any]]

BRIGHTNESS = ("task.dataset=", "task.environment=brightness", "task.choices=", "task.rewards=[]")


def metrics(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def test_every_step_is_measured_and_the_due_ones_are_evaluated_and_saved(
    run_toy: Run, tmp_path: Path, watcher: Any
) -> None:
    summary = run_toy("training.keep_checkpoints=9", "training.sample_every=4")

    lines = metrics(tmp_path)
    assert [line["step"] for line in lines] == list(range(8))
    assert [line["step"] for line in lines if "eval/success_rate" in line] == [0, 3, 6, 7]
    assert set(watcher.evaluations) == {0, 3, 6, 7}
    assert watcher.steps == list(range(1, 8))
    run = tmp_path / "run"
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == [
        "step-000002",
        "step-000004",
        "step-000006",
        "step-000007",
    ]
    assert sorted(path.name for path in (run / "trajectories").glob("*.md")) == ["step-000001.md", "step-000005.md"]
    assert json.loads((run / "summary.json").read_text(encoding="utf-8")) == summary
    assert {
        "reward/mean",
        "reward/std",
        "reward/match",
        "rollout/success_rate",
        "rollout/uniform_groups",
        "rollout/action_tokens",
        "rollout/cut_share",
        "rollout/unparsable_share",
        "rollout/turns",
        "rollout/truncated_share",
        "rollout/environment_failures",
        "policy/loss",
        "policy/entropy",
        "policy/grad_norm",
        "policy/learning_rate",
        "policy/logprob_gap",
        "policy/updates",
        "time/rollout",
        "time/reward",
        "time/update",
        "time/sync",
    } <= set(lines[1])
    assert all(isinstance(value, (int, float)) and np.isfinite(value) for line in lines for value in line.values())


def test_the_summary_holds_the_first_the_last_and_the_best_evaluation(run_toy: Run, watcher: Any) -> None:
    summary = run_toy("training.steps=6", "training.learning_rate=0.05")

    rates = {step: evaluation.success_rate for step, evaluation in watcher.evaluations.items()}
    assert summary["eval"]["first"] == watcher.evaluations[0].summary()
    assert summary["eval"]["last"] == watcher.evaluations[6].summary()
    best = max(rates, key=lambda step: rates[step])  # the first of equals
    assert summary["eval"]["best"] == {**watcher.evaluations[best].summary(), "step": best}
    assert (summary["status"], summary["steps"], summary["seed"]) == ("completed", 6, 0)
    assert summary["wall_seconds"] > 0


def test_the_checkpoint_of_the_best_evaluation_is_kept(
    run_toy: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates = iter([0.1, 0.9, 0.3, 0.9])
    monkeypatch.setattr(loop, "evaluate", lambda *_: Evaluation(next(rates), 0.0, 1.0, 6, 0.0, 0.0, {}, (), ()))

    summary = run_toy("training.steps=6", "training.eval_every=2", "training.keep_checkpoints=1")

    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()) == ["step-000002", "step-000006"]
    assert summary["eval"]["best"]["step"] == 2


def test_no_two_steps_share_their_randomness(run_toy: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the seed of sampling nor those of episodes; and none of those held out is trained on."""
    sampling: list[int | None] = []
    episodes: list[list[int]] = []
    original = Episodes.play

    def watched(self: Episodes, starts: Any, group_size: int, seed: int | None, behaviour: Any = None) -> Any:
        sampling.append(seed)
        episodes.append([start.seed for start in starts])
        return original(self, starts, group_size, seed, behaviour)

    monkeypatch.setattr(Episodes, "play", watched)
    run_toy(*BRIGHTNESS, "training.steps=3", "training.eval_every=0", "training.eval_episodes=4")

    # An evaluation, three steps, an evaluation.
    assert (sampling[0], sampling[-1]) == (None, None)
    assert None not in sampling[1:-1]
    assert len(set(sampling[1:-1])) == 3
    assert episodes[0] == episodes[-1]
    assert len({seed for seeds in episodes[:-1] for seed in seeds}) == 16


def test_zero_means_only_at_the_ends(run_toy: Run, tmp_path: Path) -> None:
    run_toy("training.steps=3", "training.eval_every=0", "training.save_every=0", "training.sample_every=0")

    assert [line["step"] for line in metrics(tmp_path) if "eval/success_rate" in line] == [0, 3]
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-000003"]
    assert not (tmp_path / "run" / "trajectories").exists()


@pytest.mark.parametrize("seed", [0, 1])
def test_a_policy_learns_what_is_rewarded(run_toy: Run, seed: int) -> None:
    """To tell dark from bright pictures: every part of the loop has to do its work."""
    summary = run_toy(
        *BRIGHTNESS,
        f"training.seed={seed}",
        "training.eval_episodes=20",
        "training.temperature=1.0",
        "training.learning_rate=1.0e-2",
        "training.steps=25",
        "training.prompts_per_step=8",
        "training.save_every=0",
    )

    assert summary["eval"]["first"]["success_rate"] <= 0.7
    assert summary["eval"]["last"]["success_rate"] == 1.0


def test_demonstrations_teach_without_rollouts(run_toy: Run, tmp_path: Path) -> None:
    summary = run_toy("algorithm=toy_imitation", "training.steps=30", "training.learning_rate=2.0e-2")

    assert summary["eval"]["last"]["success_rate"] == 1.0
    assert "policy/logprob_gap" not in metrics(tmp_path)[1]
    assert metrics(tmp_path)[1]["reward/mean"] == 1.0


def test_an_environment_needs_no_data(run_toy: Run, tmp_path: Path) -> None:
    summary = run_toy(*BRIGHTNESS, "training.eval_episodes=8")

    assert (summary["status"], summary["eval"]["last"]["episodes"]) == ("completed", 8)
    text = (tmp_path / "run" / "trajectories" / "step-000001.md").read_text(encoding="utf-8")
    assert "## episode with seed " in text


HOOKS = """
from rllava_core import hookimpl

calls = []

@hookimpl
def rllava_run_start(config, run_dir):
    calls.append(("start", config.training.steps, sorted(path.name for path in run_dir.iterdir())))

@hookimpl
def rllava_step_end(step, metrics):
    calls.append(("step", step, metrics["reward/mean"]))

@hookimpl
def rllava_run_end(summary):
    calls.append(("end", summary["status"]))
"""


def test_plugins_follow_a_run(run_toy: Run, fake_distribution: Any, tmp_path: Path) -> None:
    fake_distribution("rllava-follower", "1.0", HOOKS)

    run_toy("training.steps=2")

    import rllava_follower  # type: ignore[import-not-found]

    assert rllava_follower.calls == [
        ("start", 2, ["checkpoints", "config.yaml", "manifest.json"]),
        ("step", 1, metrics(tmp_path)[1]["reward/mean"]),
        ("step", 2, metrics(tmp_path)[2]["reward/mean"]),
        ("end", "completed"),
    ]


def test_trackers_are_given_what_the_log_is_given_and_closed(
    run_toy: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[tuple[int, dict[str, float]]] = []
    closed: list[bool] = []

    class Tracker:
        def __init__(self, names: tuple[str, ...], directory: Path, config: dict[str, Any]) -> None:
            assert names == ("tensorboard",)
            assert config["training"]["steps"] == 2

        def write(self, step: int, values: dict[str, float]) -> None:
            written.append((step, dict(values)))

        def close(self) -> None:
            closed.append(True)

    monkeypatch.setattr(loop, "Trackers", Tracker)
    monkeypatch.setattr(loop, "check_trackers", lambda names: None)
    run_toy("training.steps=2", "training.trackers=[tensorboard]")

    assert [{"step": step, **values} for step, values in written] == metrics(tmp_path)
    assert closed == [True]


def test_trackers_are_closed_when_a_run_fails(run_toy: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    closed: list[bool] = []
    monkeypatch.setattr(loop.Trackers, "close", lambda self: closed.append(True))

    with pytest.raises(RewardError):
        run_toy("task.rewards=[{name: broken, call: 3}]")

    assert closed == [True]


MISTAKES: dict[str, tuple[tuple[str, ...], type[Exception], str]] = {
    "no examples": (("task.dataset.count=0",), DataError, "data set 'colours' has no held_out examples"),
    "none to train on": (("task.dataset.count=1",), DataError, "data set 'colours' has no train examples"),
    "no end of seeds": (
        ("task.dataset=", "task.environment=brightness", "task.choices="),
        ConfigError,
        "training.eval_episodes: set how many, for without a task.dataset there is no end of held-out episodes",
    ),
    "no such model": (("model={adapter: toy, path: nowhere}",), Exception, "model nowhere: holds no config.json"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_that_stops_a_run_before_it_begins_leaves_no_run_directory(
    run_toy: Run, tmp_path: Path, mistake: str
) -> None:
    overrides, kind, message = MISTAKES[mistake]

    with pytest.raises(kind, match=rf"^{message}") as caught:
        run_toy(*overrides)

    assert getattr(caught.value, "exit_code", None) == 2
    assert not (tmp_path / "run").exists()


def test_data_are_checked_before_weights_are_loaded(run_toy: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from rllava_core.testing.tiny import TinyAdapter

    def load(self: object) -> None:
        raise AssertionError("loaded")

    monkeypatch.setattr(TinyAdapter, "load", load)
    with pytest.raises(DataError, match="no train examples"):
        run_toy("task.dataset.count=1")
    with pytest.raises(DataError, match="no held_out examples"):
        run_toy("task.dataset.count=0")


@pytest.mark.parametrize(
    ("place", "error"),
    [
        ("score", RewardError("reward 'x' raised")),
        ("learning_rate", TrainingError("the loss became nan")),
        ("check_recomputed", InvariantError("log-probs differ")),
    ],
)
def test_a_run_that_fails_says_in_which_step_and_what_was_saved(
    run_toy: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, error: Exception
) -> None:
    original, calls = getattr(loop, place), []

    def fail(*args: Any) -> Any:
        calls.append(1)
        if len(calls) == 4:
            raise error
        return original(*args)

    monkeypatch.setattr(loop, place, fail)
    with pytest.raises(type(error)) as caught:
        run_toy()

    saved = tmp_path / "run" / "checkpoints" / "step-000002"
    assert saved.is_dir()
    assert str(caught.value).startswith("step 4: ")
    assert str(caught.value).endswith(f"; the last good checkpoint is {saved}")
    assert [line["step"] for line in metrics(tmp_path)] == [0, 1, 2, 3]


def test_a_run_that_fails_at_once_says_that_nothing_was_saved(run_toy: Run) -> None:
    # The first call is the evaluation's.
    with pytest.raises(RewardError, match=r"^step 1: reward 'broken' raised .*; no checkpoint had been saved yet$"):
        run_toy("task.rewards=[{name: broken, call: 2}]")


def test_a_policy_that_is_not_the_one_that_sampled_is_noticed(run_toy: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from rllava_core.engines.local_train import LocalTrainEngine
    from rllava_core.testing.tiny import TinyAdapter

    positions, step = TinyAdapter.positions, LocalTrainEngine.step

    def elsewhere(self: LocalTrainEngine, *arguments: Any) -> Any:
        """The update alone places what was shown three times as far apart."""
        with monkeypatch.context() as changed:
            changed.setattr(TinyAdapter, "positions", lambda *given: positions(*given) * 3)
            return step(self, *arguments)

    monkeypatch.setattr(LocalTrainEngine, "step", elsewhere)
    with pytest.raises(InvariantError, match=r"^step \d+: log-probs while sampling and recomputed differ by"):
        run_toy("task.choices=", "training.max_logprob_gap=1.0e-3")


def test_ctrl_c_ends_the_run_after_the_step_and_is_ours_no_longer_afterwards(
    run_toy: Run, tmp_path: Path, watcher: Any
) -> None:
    before = signal.getsignal(signal.SIGINT)
    watcher.stepped = lambda step, metrics: signal.raise_signal(signal.SIGINT) if step == 3 else None

    summary = run_toy()

    assert (summary["status"], summary["steps"], watcher.stops) == ("interrupted", 3, 1)
    assert [path.name for path in sorted((tmp_path / "run" / "checkpoints").iterdir())] == [
        "step-000002",
        "step-000003",
    ]
    assert signal.getsignal(signal.SIGINT) is before


def test_a_second_ctrl_c_is_not_waited_for(run_toy: Run, tmp_path: Path, watcher: Any) -> None:
    def press_twice(step: int, metrics: object) -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    watcher.stepped = press_twice
    with pytest.raises(KeyboardInterrupt):
        run_toy()

    assert json.loads((tmp_path / "run" / "summary.json").read_text())["status"] == "interrupted"


def test_a_run_works_outside_the_main_thread(run_toy: Run) -> None:
    """Where Python delivers no Ctrl-C."""
    summaries: list[dict[str, Any]] = []
    thread = threading.Thread(target=lambda: summaries.append(run_toy("training.steps=1")))
    thread.start()
    thread.join()

    assert summaries[0]["status"] == "completed"


def turn(reward: float, tokens: int = 1, ended: bool = True, parsed: bool = True, success: bool = False) -> Turn:
    action = ActionSegment(tuple(range(tokens)), np.zeros(tokens, np.float32), "x", ended)
    return Turn((ContextSegment((1,)),), action, reward, parsed, {"success": success})


def played(group: int, *turns: Turn, truncation: Truncation | None = None) -> Trajectory:
    return Trajectory(None, 0, group, turns, terminated=truncation is None, truncation=truncation)


def test_a_step_is_described_by_what_its_trajectories_are() -> None:
    trajectories = [
        played(0, turn(0.25, 2), turn(0.75, 1, parsed=False, success=True)),
        played(0, turn(1.0, 3, ended=False)),
        played(1, turn(0.0), turn(0.5, parsed=False), turn(-0.5, 4, parsed=False), truncation="turns"),
        played(1, turn(1.0, 2), turn(2.0, 2), truncation="failure"),
        played(1, turn(0.0, 5), truncation="turns"),
    ]
    limits = Limits(max_new_tokens=1, max_turns=1, max_episode_tokens=None, history="all")
    nothing: Any = None
    task = Task(environments=nothing, examples=lambda split: None, rewards=(), limits=limits)

    described = describe(trajectories, task)

    assert described == pytest.approx(
        {
            "reward/mean": 1.0,
            "reward/std": np.std([1, 1, 0, 3, 0]),
            "rollout/success_rate": 0.2,
            "rollout/uniform_groups": 0.5,
            "rollout/action_tokens": 21 / 5,  # of all turns of an episode
            "rollout/cut_share": 1 / 9,  # of turns
            "rollout/unparsable_share": 3 / 9,
            "rollout/turns": 9 / 5,
            "rollout/truncated_share": 3 / 5,
            "rollout/truncated_by_failure": 1 / 5,
            "rollout/truncated_by_turns": 2 / 5,
        }
    )


# What an algorithm may do between the steps.


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
    run_toy: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original: Prepare = ToyGradient.prepare
    sent: list[Mapping[str, float]] = []

    def prepare(self: ToyGradient, trajectories: Sequence[Trajectory], policy: PolicyAccess) -> Any:
        for batch in original(self, trajectories, policy):
            sent.append((yield batch))

    monkeypatch.setattr(ToyGradient, "prepare", prepare)
    run_toy("training.steps=2", "algorithm.epochs=3")

    assert len(sent) == 6
    for number, line in enumerate(metrics(tmp_path)[1:]):
        own = sent[3 * number : 3 * number + 3]
        assert line["policy/updates"] == 3
        for name in ("policy/loss", "policy/grad_norm"):
            assert line[name] == pytest.approx(np.mean([update[name] for update in own]))


def test_an_algorithm_may_leave_the_remaining_batches_out(
    run_toy: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ToyGradient, "stops", lambda self, metrics: metrics["policy/grad_norm"] > 0)
    run_toy("training.steps=2", "algorithm.epochs=3")

    assert [line["policy/updates"] for line in metrics(tmp_path)[1:]] == [1, 1]


def test_a_prepare_that_is_no_generator_will_do(run_toy: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original: Prepare = ToyGradient.prepare
    monkeypatch.setattr(ToyGradient, "prepare", lambda *given: list(original(*given)))
    run_toy("training.steps=2", "algorithm.epochs=3")

    assert [line["policy/updates"] for line in metrics(tmp_path)[1:]] == [3, 3]


def test_a_step_may_be_without_an_update(run_toy: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While experience is still being collected."""
    original: Prepare = ToyGradient.prepare
    calls: list[int] = []

    def prepare(self: ToyGradient, trajectories: Sequence[Trajectory], policy: PolicyAccess) -> Any:
        calls.append(1)
        return original(self, trajectories, policy) if len(calls) > 2 else iter(())

    monkeypatch.setattr(ToyGradient, "prepare", prepare)
    summary = run_toy("training.steps=3")

    assert summary["status"] == "completed"
    lines = metrics(tmp_path)[1:]
    assert [line["policy/updates"] for line in lines] == [0, 0, 1]
    assert ["policy/loss" in line for line in lines] == [False, False, True]


def test_what_an_algorithm_reports_is_logged(run_toy: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked after the last step of the iteration."""
    monkeypatch.setattr(ToyGradient, "report", lambda self: {"toy/running": float(self.running)})
    original: Prepare = ToyGradient.prepare
    running: list[float] = []

    def prepare(self: ToyGradient, trajectories: Sequence[Trajectory], policy: PolicyAccess) -> Any:
        yield from original(self, trajectories, policy)
        running.append(float(self.running))

    monkeypatch.setattr(ToyGradient, "prepare", prepare)
    run_toy("training.steps=2")

    first, *lines = metrics(tmp_path)
    assert "toy/running" not in first
    assert [line["toy/running"] for line in lines] == pytest.approx(running)


def test_only_what_the_policy_has_just_sampled_is_compared_with_it(
    run_toy: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is drawn from a replay was sampled by a policy that is no more."""
    original: Prepare = ToyGradient.prepare
    replay: list[Trajectory] = []

    def prepare(self: ToyGradient, trajectories: Sequence[Trajectory], policy: PolicyAccess) -> Any:
        replay.extend(trajectories)
        yield from original(self, {16: replay, 32: replay[:16], 48: replay[12:]}[len(replay)], policy)

    checked: list[int] = []
    check = loop.check_recomputed

    def counting(trajectories: Sequence[Trajectory], *others: Any) -> float:
        checked.append(len(trajectories))
        return check(trajectories, *others)

    monkeypatch.setattr(ToyGradient, "prepare", prepare)
    monkeypatch.setattr(loop, "check_recomputed", counting)
    # With this learning rate the old log-probs are far away from the new ones.
    run_toy("training.steps=3", "training.learning_rate=0.1", "training.max_logprob_gap=1.0e-3")

    lines = metrics(tmp_path)[1:]
    assert checked == [16, 16]  # all of the first step, none of the second, and 16 of 36 of the third
    assert ["policy/logprob_gap" in line for line in lines] == [True, False, True]
    assert lines[2]["policy/logprob_gap"] < 1e-3


@pytest.mark.parametrize("tokens", [1, 50, 10**6])
def test_the_gap_is_a_mean_over_what_was_compared_however_the_batch_is_cut(
    run_toy: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokens: int
) -> None:
    original: Prepare = ToyGradient.prepare
    replay: list[Trajectory] = []

    def prepare(self: ToyGradient, trajectories: Sequence[Trajectory], policy: PolicyAccess) -> Any:
        replay.extend(trajectories)
        yield from original(self, replay, policy)

    monkeypatch.setattr(ToyGradient, "prepare", prepare)
    monkeypatch.setattr(loop, "check_recomputed", lambda *given: 0.25)
    run_toy("training.steps=2", f"training.micro_batch_tokens={tokens}")

    assert [line["policy/logprob_gap"] for line in metrics(tmp_path)[1:]] == pytest.approx([0.25, 0.25])


def test_the_second_update_of_a_step_is_not_compared(run_toy: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    checked: list[int] = []
    check = loop.check_recomputed
    monkeypatch.setattr(loop, "check_recomputed", lambda *given: checked.append(1) or check(*given))
    run_toy("training.steps=2", "algorithm.epochs=3")

    assert len(checked) == 2


def test_a_policy_that_explores_is_not_compared_with_what_it_says(
    run_toy: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
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

    assert not [line for line in metrics(tmp_path) if "policy/logprob_gap" in line]
    # Evaluations do not explore.
    assert asked == [Behaviour(), exploring, exploring, Behaviour()]


# Environments in workers, which may fail.


class Unreliable:
    """A pool of which some members of a step's episodes fail, by their number: before the reset, or in the first turn.

    A step has 16 episodes, an evaluation 6, and one is begun before the run.
    """

    def __init__(self, pool: Any, reset: Mapping[int, str], step: Mapping[int, str], size: int = 16) -> None:
        self.pool = pool
        self.failures = {"reset": reset, "step": step}
        self.size = size
        self.closed = 0

    def reset(self, starts: Sequence[Start]) -> list[Observation | Failure]:
        self.active = len(starts) == self.size
        return [self.found("reset", number) or seen for number, seen in enumerate(self.pool.reset(starts))]

    def step(self, actions: Mapping[int, Action]) -> dict[int, Transition | Failure]:
        return {number: self.found("step", number) or seen for number, seen in self.pool.step(actions).items()}

    def found(self, when: str, number: int) -> Failure | None:
        what = self.failures[when].get(number) if self.active else None
        return None if what is None else Failure(what)

    def close(self) -> None:
        self.closed += 1
        self.pool.close()


@pytest.fixture
def unreliable(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Unreliable]]:
    """`unreliable(reset={3: "died"}, step={})`: the pools of runs to come; returns those that were made."""

    def prepare(reset: Mapping[int, str], step: Mapping[int, str], size: int = 16) -> list[Unreliable]:
        original = build.environment_pool
        made: list[Unreliable] = []

        def make(resolved: Any) -> Unreliable:
            made.append(Unreliable(original(resolved), reset, step, size))
            return made[-1]

        monkeypatch.setattr(build, "environment_pool", make)
        return made

    return prepare


def test_environments_that_fail_are_told_of_once_a_kind_and_counted(
    run_toy: Run, tmp_path: Path, watcher: Any, unreliable: Any
) -> None:
    unreliable({3: "died", 4: "died"}, {9: "did not answer for 60 s"})

    summary = run_toy("training.steps=3")

    assert summary["status"] == "completed"
    assert summary["environment_failures"] == {"died": 6, "did not answer for 60 s": 3}
    assert json.loads((tmp_path / "run" / "summary.json").read_text(encoding="utf-8")) == summary
    assert len(watcher.warnings) == 2
    for warning, what in zip(watcher.warnings, ("died", "did not answer for 60 s"), strict=True):
        expected = rf"step 1: colours:\d+: the environment {what}; its episode ends here and the run goes on"
        assert re.fullmatch(expected, warning)
    lines = metrics(tmp_path)
    assert [line["rollout/environment_failures"] for line in lines[1:]] == [3, 3, 3]
    assert "rollout/environment_failures" not in lines[0]


def test_a_run_without_failures_does_not_speak_of_them(run_toy: Run, tmp_path: Path) -> None:
    assert "environment_failures" not in run_toy("training.steps=1")
    assert metrics(tmp_path)[1]["rollout/environment_failures"] == 0


def test_failures_are_counted_over_a_resume(run_toy: Run, watcher: Any, unreliable: Any) -> None:
    unreliable({3: "died"}, {})
    watcher.stepped = lambda step, metrics: signal.raise_signal(signal.SIGINT) if step == 2 else None
    assert run_toy("training.steps=4")["environment_failures"] == {"died": 2}

    watcher.stepped = lambda step, metrics: None
    assert run_toy("training.steps=4", resume=True)["environment_failures"] == {"died": 4}
    assert len([warning for warning in watcher.warnings if "died" in warning]) == 1


def test_endless_kinds_of_failures_do_not_flood_the_screen(run_toy: Run, watcher: Any, unreliable: Any) -> None:
    steps = 0

    class Numbered(dict[int, str]):
        def get(self, number: int, default: Any = None) -> Any:
            nonlocal steps
            steps += 1
            return f"raised {steps}" if number < 15 else None

    unreliable({}, Numbered())
    summary = run_toy("training.steps=2")

    assert len(watcher.warnings) == len(summary["environment_failures"]) == 20


def test_a_failure_in_an_evaluation_is_told_of_too(run_toy: Run, watcher: Any, unreliable: Any) -> None:
    unreliable({2: "died"}, {}, size=6)
    summary = run_toy("training.steps=1")

    assert [evaluation.episodes for evaluation in watcher.evaluations.values()] == [5, 5]
    assert summary["environment_failures"] == {"died": 2}
    assert len(watcher.warnings) == 1


@pytest.mark.parametrize(
    ("size", "message"),
    [
        (16, r"^step 1: the environments of all episodes failed before their first turn was done; no checkpoint"),
        (6, r"^evaluation at step 0: the environments of all held-out episodes failed before"),
        (1, r"^colours:0: the environment died$"),
    ],
)
def test_a_run_whose_environments_all_fail_ends(run_toy: Run, unreliable: Any, size: int, message: str) -> None:
    unreliable({}, dict.fromkeys(range(16), "died"), size) if size > 1 else unreliable({0: "died"}, {}, size)
    with pytest.raises(TrainingError, match=message):
        run_toy()


def test_environments_are_closed_however_a_run_ends(run_toy: Run, unreliable: Any, tmp_path: Path) -> None:
    made = unreliable({}, {})
    run_toy("training.steps=1")
    assert [pool.closed for pool in made] == [1]

    shutil.rmtree(tmp_path / "run")
    with pytest.raises(RewardError):
        run_toy("task.rewards=[{name: broken, call: 2}]")
    assert [pool.closed for pool in made] == [1, 1]
