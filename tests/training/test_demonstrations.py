"""Demonstrations: episodes that answer what the example says."""

from __future__ import annotations

import numpy as np
import pytest

from rllava_core.errors import DataError, TrainingError
from rllava_core.mdp.environment import Start
from rllava_core.mdp.examples import Example
from rllava_core.testing.tiny import END

from .playing import (
    PICTURE,
    Build,
    Flaky,
    Scripted,
    episodes,
    shown,
)


def example(answer: str | None, choices: tuple[str, ...] | None = None) -> Start:
    return Start(Example("train.jsonl:7", {"question": "?"}, (PICTURE,), answer, choices), 5)


def test_a_demonstration_is_the_examples_answer(build_toy: Build) -> None:
    parts = build_toy("task.choices=")

    free, chosen = episodes(parts).demonstrate([example("ab"), example("2", ("1", "2"))])

    assert free.actions[0].tokens == (*parts.adapter.encode("ab"), END)
    assert (free.answer, free.decisions, free.group) == ("ab", 3, 0)
    assert (chosen.actions[0].choice, chosen.answer, chosen.decisions, chosen.group) == (1, "2", 1, 1)
    assert not np.concatenate([free.behaviour_logprobs, chosen.behaviour_logprobs]).any()


def test_a_demonstration_needs_an_answer_among_the_choices(build_toy: Build) -> None:
    player = episodes(build_toy())

    with pytest.raises(DataError, match=r"^train\.jsonl:7: has no answer to learn from"):
        player.demonstrate([example(None)])
    with pytest.raises(DataError, match=r"^train\.jsonl:7: answer 'pink' is none of the choices red, green, blue"):
        player.demonstrate([example("pink")])
    with pytest.raises(DataError, match=r"^episode with seed 3: has no answer"):
        episodes(build_toy(), Scripted).demonstrate([Start(None, 3)])


def test_an_environment_that_goes_on_after_a_demonstration_is_refused_by_name(build_toy: Build) -> None:
    with pytest.raises(TrainingError, match=r"^train\.jsonl:7: the environment goes on after the example's answer; "):
        episodes(build_toy(), lambda: Scripted(shown("more"))).demonstrate([example("a")])


@pytest.mark.parametrize("turn", [0, 1])
def test_an_environment_that_fails_in_a_demonstration_is_named(build_toy: Build, turn: int) -> None:
    pool = Flaky(Scripted, {(0, turn): "was killed by signal 9"})

    with pytest.raises(TrainingError, match=r"^train\.jsonl:7: the environment was killed by signal 9$"):
        episodes(build_toy(), pool).demonstrate([example("a")])
