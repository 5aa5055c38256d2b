"""Episodes sampled while the policy is trained: by which weights, whose they are, and what a checkpoint keeps."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from rllava_core.errors import TrainingError
from rllava_core.mdp.environment import Start
from rllava_core.mdp.trajectory import Trajectory
from rllava_core.policy.behaviour import Behaviour
from rllava_core.training.build import Parts
from rllava_core.training.episodes import Episodes
from rllava_core.training.storage import load_tree, save_tree

AHEAD = ("engine.rollout.async=1", "algorithm.importance=token")
TEXT = ("task.choices=", "task.max_new_tokens=4")
SEED = 7

Build = Callable[..., Parts]


def starts(parts: Parts) -> list[Start]:
    examples = parts.task.examples("train")
    assert examples is not None
    return [Start(example, number) for number, example in enumerate(examples[:3])]


def begin(parts: Parts, seed: int = SEED) -> None:
    parts.episodes.play_ahead(starts(parts), 4, seed, Behaviour())


def play(parts: Parts, seed: int = SEED) -> list[Trajectory]:
    return parts.episodes.play(starts(parts), 4, seed, Behaviour())


def contents(trajectories: Sequence[Trajectory]) -> list[Any]:
    """Everything that is trained on, by value."""
    return [
        (item.group, item.terminated, item.truncation, [_turn(turn) for turn in item.turns]) for item in trajectories
    ]


def _turn(turn: Any) -> Any:
    action = {**asdict(turn.action), "logprobs": turn.action.logprobs.tobytes()}
    return [segment.tokens for segment in turn.context], action, turn.reward, turn.parsed


def change(parts: Parts) -> None:
    """What an optimizer step does, only more of it."""
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in parts.trainer.policy.parameters():
            parameter.add_(torch.randn_like(parameter))


@pytest.mark.parametrize("kind", [(), TEXT], ids=["choices", "text"])
def test_the_weights_are_those_that_the_engine_had_when_they_were_begun(build_toy: Build, kind: Sequence[str]) -> None:
    parts = build_toy(*AHEAD, *kind)
    expected = contents(play(parts))
    assert parts.episodes.behind == 0

    begin(parts)
    change(parts)
    found = play(parts)

    assert contents(found) == expected
    assert parts.episodes.behind == 1
    # Not handed over yet.
    assert contents(play(parts)) == expected
    parts.sampler.sync(parts.trainer.policy)
    assert contents(play(parts)) != expected
    assert parts.episodes.behind == 0


def test_an_engine_without_async_acts_by_the_weights_as_they_are(build_toy: Build) -> None:
    parts = build_toy()
    before = contents(play(parts))

    change(parts)

    assert contents(play(parts)) != before


def test_they_are_played_beside_what_is_done_meanwhile(build_toy: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = build_toy(*AHEAD)
    trained = threading.Event()
    generate = parts.sampler.generate
    where: list[threading.Thread] = []

    def after_the_step(*arguments: Any) -> Any:
        where.append(threading.current_thread())
        assert trained.wait(60)
        return generate(*arguments)

    monkeypatch.setattr(parts.sampler, "generate", after_the_step)
    begin(parts)
    trained.set()  # would never be reached by an engine that was asked in this thread

    assert len(play(parts)) == 12
    assert where[0] is not threading.main_thread()


def test_other_episodes_may_be_played_in_between(build_toy: Build) -> None:
    parts = build_toy(*AHEAD, *TEXT)
    expected = contents(play(parts))
    begin(parts)
    parts.episodes.wait()

    others = contents(play(parts, SEED + 1))

    assert parts.episodes.behind == 0
    assert others != expected
    assert contents(play(parts)) == expected
    assert parts.episodes.behind == 1


@pytest.mark.parametrize("kind", [(), TEXT], ids=["choices", "text"])
def test_a_checkpoint_keeps_them(
    build_toy: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: Sequence[str]
) -> None:
    parts = build_toy(*AHEAD, *kind)
    expected = contents(play(parts))
    begin(parts)
    save_tree(parts.episodes.state_dict(), tmp_path / "state")
    other = build_toy(*AHEAD, *kind)
    change(other)

    other.episodes.load_state_dict(load_tree(tmp_path / "state"))

    monkeypatch.setattr(other.sampler, "generate", None)  # nobody may ask
    assert contents(play(other)) == expected
    assert other.episodes.behind == 1


def test_a_checkpoint_without_any_says_so(build_toy: Build) -> None:
    parts = build_toy(*AHEAD)
    assert parts.episodes.state_dict() == {}
    begin(parts)
    play(parts)
    assert parts.episodes.state_dict() == {}


def test_an_environment_that_does_otherwise_when_it_is_asked_again_is_named(build_toy: Build) -> None:
    parts = build_toy(*AHEAD)
    begin(parts)
    state = parts.episodes.state_dict()
    state["turns"] = []
    other = build_toy(*AHEAD)
    other.episodes.load_state_dict(state)

    with pytest.raises(TrainingError, match=r"goes on where it ended before .*remove the newest checkpoint"):
        play(other)


def test_what_goes_wrong_is_told_when_they_are_asked_for(build_toy: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = build_toy(*AHEAD)

    def fails(*_: Any) -> Any:
        raise TrainingError("the server is gone")

    monkeypatch.setattr(parts.sampler, "generate", fails)
    begin(parts)
    parts.episodes.wait()
    assert parts.episodes.state_dict() == {}

    with pytest.raises(TrainingError, match="the server is gone"):
        play(parts)


def test_the_end_of_a_run_waits_for_them(build_toy: Build) -> None:
    with build_toy(*AHEAD) as parts:
        begin(parts)
        episodes: Episodes = parts.episodes
    with pytest.raises(RuntimeError, match="shutdown"):
        begin(parts)
    assert episodes is parts.episodes


def test_a_run_trains_each_step_on_what_the_weights_before_it_sampled(
    run_toy: Callable[..., dict[str, Any]], logged: Callable[[], list[dict[str, Any]]]
) -> None:
    run_toy(*AHEAD, "training.steps=4", "training.eval_every=2")

    lines = logged()
    steps = lines[1:]
    assert [line["rollout/behind"] for line in steps] == [0.0, 1.0, 1.0, 1.0]
    # Only what the policy as it is has sampled can be compared with what it computes.
    assert ["policy/logprob_gap" in line for line in steps] == [True, False, False, False]
    assert steps[0]["policy/importance"] == pytest.approx(1.0, abs=1e-5)
    assert all(line["policy/importance"] != pytest.approx(1.0, abs=1e-5) for line in steps[1:])
    assert all("time/wait" in line for line in steps)


@pytest.mark.parametrize(
    ("algorithm", "problem"),
    [
        ("toy_gradient", "correct that by algorithm.importance=token, or sequence"),
        ("toy_imitation", "algorithm 'toy_imitation' samples nothing"),
    ],
)
def test_what_cannot_be_corrected_is_refused(refused: Any, toy_config: Path, algorithm: str, problem: str) -> None:
    message = refused("train", str(toy_config), f"algorithm={algorithm}", "engine.rollout.async=1")

    assert problem in message
    assert "without it: engine.rollout.async=0" in message


@pytest.mark.parametrize("value", ["2", "yes", "-1"])
def test_no_more_than_one_step_ahead(refused: Any, toy_config: Path, value: str) -> None:
    message = refused("train", str(toy_config), f"engine.rollout.async={value}")

    assert "engine.rollout.async" in message
