"""What a checkpoint keeps of the replay, and that a run goes on from it bit for bit."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from rllava_core.training.storage import save_tree
from rllava_dqn.algorithm import DQN
from rllava_dqn.config import DQNConfig
from rllava_dqn.replay import Replay
from rllava_dqn.saving import replay_state, restore_replay
from rllava_dqn.transitions import transitions

from .conftest import Episodes, TablePolicy, number_of

PLENTY = 2**40

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "prioritised": {"priority_alpha": 0.7, "priority_beta_turns": 50, "n_steps": 3},
    "few": {"replay_size": 7, "priority_alpha": 0.5},
    "little memory": {"replay_bytes": 30_000, "priority_alpha": 0.5, "n_steps": 2},
    "target": {"target_every": 3, "epsilon_turns": 60, "updates_per_turn": 0.37},
}


def iteration(algorithm: DQN, policy: TablePolicy, episodes: Episodes, number: int) -> list[dict[str, torch.Tensor]]:
    """What the loop does in a step: the columns and states of every batch."""
    torch.manual_seed(number)
    history = "all" if number % 2 else "one"
    played = [episodes(1 + number % 4, terminated=bool(k % 2), history=history) for k in range(3)]
    seen = []
    for batch in algorithm.prepare(played, policy):
        states = [number_of(trajectory.turns[0].context) for trajectory in batch.trajectories]
        logprobs = [float(trajectory.behaviour_logprobs[0]) for trajectory in batch.trajectories]
        pixels = [
            [image.digest for segment in trajectory.turns[0].context for image in getattr(segment, "images", ())]
            for trajectory in batch.trajectories
        ]
        seen.append({**batch.columns, "states": torch.tensor(states), "logprobs": torch.tensor(logprobs)})
        seen[-1]["pixels"] = torch.tensor([hash(str(row)) for row in pixels])
        # The values move as they would in training, so that what is drawn when matters.
        for table in policy.own.values():
            table += 0.01 * torch.randn(table.shape, dtype=torch.float64)
    return seen


@pytest.mark.parametrize("name", OPTIONS)
def test_a_run_goes_on_bit_for_bit(name: str, through_the_disk: Callable[[Any], Any]) -> None:
    config = DQNConfig(warmup_turns=10, batch_size=8, **{"updates_per_turn": 0.5, **OPTIONS[name]})
    whole, policy, episodes = DQN(config), TablePolicy(), Episodes()
    for number in range(6):
        iteration(whole, policy, episodes, number)

    resumed = DQN(config)
    resumed.load_state_dict(through_the_disk(whole.state_dict()))

    again_policy, again_episodes = TablePolicy(), Episodes()
    again_policy.own = {name: table.clone() for name, table in policy.own.items()}
    again_policy.copy = {name: table.clone() for name, table in policy.copy.items()}
    again_episodes.random = np.random.default_rng()
    again_episodes.random.bit_generator.state = episodes.random.bit_generator.state
    again_episodes.states = episodes.states
    for number in range(6, 16):
        one = iteration(whole, policy, episodes, number)
        other = iteration(resumed, again_policy, again_episodes, number)
        assert len(one) == len(other)
        for expected, found in zip(one, other, strict=True):
            for column, values in expected.items():
                assert torch.equal(values, found[column]), column
        assert whole.report() == resumed.report()
        assert whole.behaviour().epsilon == resumed.behaviour().epsilon
    assert policy.copied[-3:] == again_policy.copied[-3:]


@pytest.mark.parametrize("name", OPTIONS)
def test_what_a_resumed_run_saves_is_the_same_to_the_byte(
    name: str, through_the_disk: Callable[[Any], Any], tmp_path: Any
) -> None:
    config = DQNConfig(warmup_turns=10, batch_size=8, **{"updates_per_turn": 0.5, **OPTIONS[name]})
    whole, policy, episodes = DQN(config), TablePolicy(), Episodes()
    for number in range(6):
        iteration(whole, policy, episodes, number)
    resumed = DQN(config)
    resumed.load_state_dict(through_the_disk(whole.state_dict()))

    save_tree(whole.state_dict(), tmp_path / "whole")
    save_tree(resumed.state_dict(), tmp_path / "resumed")

    for suffix in (".json", ".safetensors"):
        assert (tmp_path / f"whole{suffix}").read_bytes() == (tmp_path / f"resumed{suffix}").read_bytes()


def saved_and_restored(replay: Replay, through_the_disk: Callable[[Any], Any], size: int, limit: int) -> Replay:
    restored = Replay(size, limit)
    restore_replay(restored, through_the_disk(replay_state(replay)))
    return restored


@pytest.mark.parametrize("history", ["one", "all"])
def test_sharing_survives(episodes: Episodes, history: str, through_the_disk: Callable[[Any], Any]) -> None:
    replay = Replay(100, PLENTY)
    for number in range(4):
        replay.add(transitions(episodes(6, terminated=bool(number % 2), history=history), 2, 0.9))

    restored = saved_and_restored(replay, through_the_disk, 100, PLENTY)

    assert restored.bytes == replay.bytes
    assert len(restored.shelf) == len(replay.shelf)
    for before, after in zip(replay.records, restored.records, strict=True):
        assert before.transition.action.logprobs.tobytes() == after.transition.action.logprobs.tobytes()
        assert before.transition.action.choices == after.transition.action.choices
    found = [record.transition for record in restored.records]
    for first, third in zip(found, found[2:], strict=False):
        if first.seed == third.seed:
            assert first.final is third.context


def test_restored_images_are_freed_one_by_one(episodes: Episodes, through_the_disk: Callable[[Any], Any]) -> None:
    """None is a view into the tensor that held them all."""
    replay = Replay(6, PLENTY)
    replay.add(transitions(episodes(6), 1, 0.9))
    restored = saved_and_restored(replay, through_the_disk, 6, PLENTY)
    pixels = [weakref.ref(image.pixels) for image in restored.images]
    assert all(image.pixels.base is None for image in restored.images)

    restored.add(transitions(episodes(5), 1, 0.9))
    gc.collect()

    assert sum(one() is not None for one in pixels) == 2


def test_narrower_limits_keep_the_newest(episodes: Episodes, through_the_disk: Callable[[Any], Any]) -> None:
    replay = Replay(100, PLENTY)
    for _ in range(4):
        replay.add(transitions(episodes(6), 1, 0.9))
    replay.set_priorities(np.arange(24), np.arange(1.0, 25.0))

    fewer = saved_and_restored(replay, through_the_disk, 10, PLENTY)
    lighter = saved_and_restored(replay, through_the_disk, 100, replay.bytes // 3)

    assert fewer.priorities.tolist() == list(range(15, 25))
    assert lighter.bytes <= replay.bytes // 3
    assert lighter.priorities.tolist() == list(range(25 - len(lighter), 25))
    assert [number_of(one.transition.context) for one in lighter.records] == [
        number_of(one.transition.context) for one in replay.records[-len(lighter) :]
    ]


def test_an_empty_replay_is_saved_too(through_the_disk: Callable[[Any], Any]) -> None:
    algorithm = DQN(DQNConfig())
    algorithm.load_state_dict(through_the_disk(algorithm.state_dict()))
    assert len(algorithm.replay) == 0


def test_no_list_grows_with_the_transitions(episodes: Episodes) -> None:
    """Or the checkpoint's JSON would."""
    replay = Replay(1000, PLENTY)
    for _ in range(40):
        replay.add(transitions(episodes(5, history="all"), 1, 0.9))

    def lists(value: Any) -> int:
        if isinstance(value, dict):
            return sum(lists(item) for item in value.values())
        return len(value) if isinstance(value, list | tuple) else 0

    assert lists(replay_state(replay)) == 2  # one tensor for each size of images
