"""The loop: what it measures, evaluates, saves and tells, and in which order."""

from __future__ import annotations

import json
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rllava_core.errors import ConfigError, DataError, InvariantError, RewardError, TrainingError
from rllava_core.training import loop
from rllava_core.training.episodes import Episodes
from rllava_core.training.evaluation import Evaluation

Run = Callable[..., dict[str, Any]]
Logged = Callable[[], list[dict[str, Any]]]

BRIGHTNESS = ("task.dataset=", "task.environment=brightness", "task.choices=", "task.rewards=[]")


def test_every_step_is_measured_and_the_due_ones_are_evaluated_and_saved(
    run_toy: Run, logged: Logged, tmp_path: Path, watcher: Any
) -> None:
    summary = run_toy("training.keep_checkpoints=9", "training.sample_every=4")

    lines = logged()
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
    monkeypatch.setattr(loop, "gate", lambda *_: {})

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


def test_zero_means_only_at_the_ends(run_toy: Run, logged: Logged, tmp_path: Path) -> None:
    run_toy("training.steps=3", "training.eval_every=0", "training.save_every=0", "training.sample_every=0")

    assert [line["step"] for line in logged() if "eval/success_rate" in line] == [0, 3]
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


def test_demonstrations_teach_without_rollouts(run_toy: Run, logged: Logged) -> None:
    summary = run_toy("algorithm=toy_imitation", "training.steps=30", "training.learning_rate=2.0e-2")

    assert summary["eval"]["last"]["success_rate"] == 1.0
    assert "policy/logprob_gap" not in logged()[1]
    assert logged()[1]["reward/mean"] == 1.0


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


def test_plugins_follow_a_run(run_toy: Run, logged: Logged, fake_distribution: Any) -> None:
    fake_distribution("rllava-follower", "1.0", HOOKS)

    run_toy("training.steps=2")

    import rllava_follower  # type: ignore[import-not-found]

    assert rllava_follower.calls == [
        ("start", 2, ["checkpoints", "config.yaml", "manifest.json"]),
        ("step", 1, logged()[1]["reward/mean"]),
        ("step", 2, logged()[2]["reward/mean"]),
        ("end", "completed"),
    ]


def test_trackers_are_given_what_the_log_is_given_and_closed(
    run_toy: Run, logged: Logged, monkeypatch: pytest.MonkeyPatch
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

    assert [{"step": step, **values} for step, values in written] == logged()
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
        ("score_once", RewardError("reward 'x' raised")),
        ("learning_rate", TrainingError("the loss became nan")),
        ("check_recomputed", InvariantError("log-probs differ")),
    ],
)
def test_a_run_that_fails_says_in_which_step_and_what_was_saved(
    run_toy: Run, logged: Logged, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, error: Exception
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
    assert [line["step"] for line in logged()] == [0, 1, 2, 3]


def test_a_run_that_fails_at_once_says_that_nothing_was_saved(run_toy: Run) -> None:
    # The first call is the evaluation's.
    with pytest.raises(RewardError, match=r"^step 1: reward 'broken' raised .*; no checkpoint had been saved yet$"):
        run_toy("task.rewards=[{name: broken, call: 2}]")


@pytest.mark.parametrize("first", ["evaluation at step 0", "step 1"])
def test_a_policy_that_is_not_the_one_that_sampled_is_noticed(
    run_toy: Run, monkeypatch: pytest.MonkeyPatch, first: str
) -> None:
    """By the gate before the first update, or by the first step: whichever sees other positions than the sampler."""
    from rllava_core.testing.tiny import TinyAdapter

    original = TinyAdapter.positions

    def shifted(self: TinyAdapter, tokens: Any, features: Any, start: int) -> Any:
        positions = original(self, tokens, features, start)
        training = torch.is_grad_enabled() if first == "step 1" else not torch.is_inference_mode_enabled()
        return positions * 3 if training and not torch.is_inference_mode_enabled() else positions

    monkeypatch.setattr(TinyAdapter, "positions", shifted)
    with pytest.raises(
        InvariantError, match=rf"^{first}: log-probs while sampling and recomputed differ by .* worst on"
    ):
        run_toy("task.choices=", "training.max_logprob_gap=1.0e-3", "training.unseen_images=ignore")


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


def test_what_a_reward_says_of_itself_is_a_metric_of_the_step_and_of_the_evaluation(
    run_toy: Run, logged: Logged, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = iter(range(1, 99))
    monkeypatch.setattr("rllava_toy.task.Match.report", lambda _: {"calls": next(asked)}, raising=False)

    run_toy("training.steps=2", "training.eval_every=0")

    said = [{name: value for name, value in line.items() if name.endswith("match/calls")} for line in logged()]
    assert said == [
        {"eval/reward/match/calls": 1.0},
        {"reward/match/calls": 2.0},
        {"reward/match/calls": 3.0, "eval/reward/match/calls": 4.0},
    ]
