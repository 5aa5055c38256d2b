"""The replay: what it keeps, what leaves, what is shared, and what is drawn."""

from __future__ import annotations

import gc
import tracemalloc
import weakref
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from rllava_core.errors import TrainingError
from rllava_core.mdp.images import Image
from rllava_core.mdp.trajectory import ActionSegment, ContextSegment, Trajectory, Turn
from rllava_dqn.replay import Replay
from rllava_dqn.transitions import Transition, transitions

from .conftest import Episodes, number_of

PLENTY = 2**40


def filled(episodes: Episodes, count: int, size: int = 1000, limit: int = PLENTY) -> tuple[Replay, list[Transition]]:
    """A replay that was given `count` episodes of five turns, and everything that it was given."""
    replay, given = Replay(size, limit), []
    for number in range(count):
        made = transitions(episodes(5, terminated=bool(number % 2)), 2, 0.9)
        replay.add(made)
        given += made
    return replay, given


def kept(replay: Replay) -> list[int]:
    """The numbers of the states of its transitions, oldest first."""
    return [number_of(record.transition.context) for record in replay.records]


def names(given: list[Transition]) -> list[int]:
    return [number_of(transition.context) for transition in given]


def test_what_was_added_is_what_comes_back(episodes: Episodes) -> None:
    replay, given = filled(episodes, 4)

    found = [record.transition for record in replay.records]

    assert len(replay) == len(found) == 20
    for new, old in zip(found, given, strict=True):
        assert [segment.tokens for segment in new.context] == [segment.tokens for segment in old.context]
        assert [segment.images for segment in new.context] == [segment.images for segment in old.context]
        assert new.action is old.action
        assert (new.reward, new.discount, new.seed) == (old.reward, old.discount, old.seed)
        assert (new.final is None) == (old.final is None)
        assert new.final is None or number_of(new.final) == number_of(old.final)


@pytest.mark.parametrize("size", [1, 3, 7, 19])
def test_the_oldest_leave_when_there_are_too_many(episodes: Episodes, size: int) -> None:
    replay, given = filled(episodes, 4, size)
    assert kept(replay) == names(given)[-size:]
    assert (replay.priorities == 1.0).all()
    drawn = replay.sample(np.random.default_rng(0).random(200))
    assert {number_of(one.context) for one in drawn.transitions} == set(names(given)[-size:])


def test_the_oldest_leave_when_they_take_too_much_memory(episodes: Episodes) -> None:
    everything, _ = filled(Episodes(), 8)
    limit = everything.bytes // 2

    replay, given = filled(episodes, 8, limit=limit)

    assert limit * 0.8 < replay.bytes <= limit
    assert kept(replay) == names(given)[-len(replay) :]
    drawn = replay.sample(np.random.default_rng(0).random(500))
    assert {number_of(one.context) for one in drawn.transitions} == set(kept(replay))
    assert [number_of(one.context) for one in drawn.transitions] == [
        kept(replay)[number - replay.first] for number in drawn.numbers
    ]


def test_a_transition_that_does_not_fit_is_refused_with_both_sizes(episodes: Episodes) -> None:
    with pytest.raises(TrainingError, match=r"seed \d+ takes [\d,]+ bytes .* algorithm.replay_bytes is 1,000: raise"):
        filled(episodes, 1, limit=1000)


@pytest.mark.parametrize("history", ["one", "all"])
def test_the_bytes_of_what_has_left_are_free(episodes: Episodes, history: str) -> None:
    """Whatever came and went, the account is that of a replay which only ever saw what is left."""
    played = [episodes(6, terminated=bool(number % 2), history=history) for number in range(10)]
    replay, fresh = Replay(9, PLENTY), Replay(9, PLENTY)
    for episode in played:
        replay.add(transitions(episode, 3, 0.9))
    last = [one for episode in played for one in transitions(episode, 3, 0.9)][-9:]
    fresh.add(last)

    assert replay.bytes == fresh.bytes
    assert len(replay.shelf) == len(fresh.shelf)
    assert {image.digest for image in replay.images} == {
        segment.images[0].digest
        for one in last
        for segment in (*one.context, *(one.final or ()))
        if isinstance(segment, ContextSegment)
    }


def test_an_image_that_no_transition_shows_is_freed(episodes: Episodes) -> None:
    replay = Replay(5, PLENTY)
    replay.add(transitions(episodes(5), 1, 0.9))
    gone = [weakref.ref(image.pixels) for image in replay.images]
    assert len(gone) == 6  # of five turns and of the state that the episode was left in

    replay.add(transitions(episodes(4), 1, 0.9))
    gc.collect()

    # The last turn of the first episode is still there, with the state that it led to.
    assert [pixels() is not None for pixels in gone] == [False] * 4 + [True] * 2
    assert len(replay.images) == 2 + 5


def test_an_image_is_kept_once_however_many_states_and_episodes_show_it() -> None:
    """Equal pixels in objects of their own, as an environment renders them anew."""

    def episode(seed: int) -> Trajectory:
        picture = [Image.from_array(np.full((8, 8, 3), shade, np.uint8)) for shade in (1, 2, 1)]
        shown = [(ContextSegment((5, 6), (image,)),) for image in picture]
        action = ActionSegment((9,), np.zeros(1, np.float32), "go", True, 0, ((9,), (8,)))
        return Trajectory(None, seed, 0, (Turn(shown[0], action), Turn(shown[1], action)), False, "turns", shown[2])

    replay = Replay(100, PLENTY)
    replay.add(transitions(episode(1), 1, 0.9))
    once = replay.shelf.bytes
    for seed in range(2, 12):
        replay.add(transitions(episode(seed), 1, 0.9))

    assert len(replay) == 22
    assert len(replay.images) == 2
    assert replay.shelf.bytes == once
    contexts = {id(record.transition.context) for record in replay.records}
    finals = {id(record.transition.final) for record in replay.records}
    assert (len(contexts), contexts == finals) == (2, True)


def test_later_turns_share_the_segments_of_earlier_ones(episodes: Episodes) -> None:
    replay = Replay(100, PLENTY)
    replay.add(transitions(episodes(5, history="all"), 1, 0.9))

    found = [record.transition for record in replay.records]

    for before, after in pairwise(found):
        # Very same objects: the policy then reads state and next state as one stretch.
        assert all(one is other for one, other in zip(before.context, after.context, strict=False))
        assert after.context[len(before.context)] is before.action
        assert before.final is after.context


@pytest.mark.parametrize("history", ["one", "all"])
def test_the_bytes_reported_are_about_those_allocated(history: str) -> None:
    """Of the kinds that weigh: new pictures in every turn, new prompts in every turn, the whole history."""
    episodes = Episodes()
    replay = Replay(10_000, PLENTY)
    tracemalloc.start()
    for _ in range(60):
        episode = episodes(20, history=history)
        if history == "one":  # a prompt of numbers as large as those of a real vocabulary
            turns = []
            for turn in episode.turns:
                tokens = tuple(episodes.random.integers(50_000, 52_000, 100).tolist())
                turns.append(replace(turn, context=(replace(turn.observation, tokens=tokens),)))
            episode = replace(episode, turns=tuple(turns))
        replay.add(transitions(episode, 3, 0.9))
        del episode
    gc.collect()
    allocated, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()

    assert replay.bytes == pytest.approx(allocated, rel=0.25)


def test_probabilities_are_in_proportion_to_priorities(episodes: Episodes) -> None:
    replay, given = filled(episodes, 10, size=37)
    random = np.random.default_rng(1)
    priorities = random.random(37) ** 3
    replay.set_priorities(np.arange(replay.first, replay.end), priorities)
    expected = {name: p / priorities.sum() for name, p in zip(names(given)[-37:], priorities, strict=True)}

    counts = dict.fromkeys(expected, 0)
    draws = 0
    for _ in range(400):
        sample = replay.sample(random.random(50))
        for transition, probability in zip(sample.transitions, sample.probabilities, strict=True):
            name = number_of(transition.context)
            assert probability == pytest.approx(expected[name], rel=1e-12)
            counts[name] += 1
            draws += 1

    for name, probability in expected.items():
        # Five standard deviations of independent draws; stretches of their own make it less.
        assert abs(counts[name] / draws - probability) < 5 * (probability / draws) ** 0.5 + 1e-9


def test_draws_come_from_equal_stretches_of_the_priorities(episodes: Episodes) -> None:
    replay, _ = filled(episodes, 8)
    assert len(replay) == 40

    for seed in range(20):
        places = replay.sample(np.random.default_rng(seed).random(10)).numbers
        assert (places // 4 == np.arange(10)).all()


def test_new_transitions_have_the_greatest_priority_so_far(episodes: Episodes) -> None:
    replay, _ = filled(episodes, 1)
    replay.set_priorities(np.array([2, 3]), np.array([7.0, 0.1]))
    replay.set_priorities(np.array([2]), np.array([0.5]))
    replay.add(transitions(episodes(2), 1, 0.9))

    assert replay.priorities.tolist() == [1.0, 1.0, 0.5, 0.1, 1.0, 7.0, 7.0]
