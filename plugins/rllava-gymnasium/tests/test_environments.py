"""Real environments, all through one table: what is shown, what an action does, and how episodes end."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces

from rllava_core.mdp.messages import Action, Transition
from rllava_gymnasium.environment import Gymnasium

Make = Callable[..., Gymnasium]


@dataclass(frozen=True)
class Known:
    """What is known of an environment from its documentation.

    size: of its frame, (width, height).
    says: a word of its instruction; none: it has none.
    moves: an action that changes the picture from where seed 0 begins.
    """

    id: str
    size: tuple[int, int]
    choices: tuple[str, ...]
    moves: int
    says: str | None = None
    options: dict[str, Any] = field(default_factory=dict)


MOVES = ("left", "right", "forward", "pickup", "drop", "toggle", "done")
SMALL = {"kwargs": {"tile_size": 8}}
TABLE = [
    Known("MiniGrid-Empty-Random-6x6-v0", (48, 48), MOVES, 0, "goal", SMALL),
    Known("minigrid:BabyAI-GoToLocal-v0", (64, 64), MOVES, 1, "go to", SMALL),
    Known("FrozenLake-v1", (256, 256), ("0", "1", "2", "3"), 2, None, {"kwargs": {"is_slippery": False}}),
    Known("Taxi-v4", (536, 456), ("0", "1", "2", "3", "4", "5"), 0),
    Known("CliffWalking-v1", (768, 256), ("0", "1", "2", "3"), 0),
    Known("CartPole-v1", (600, 400), ("0", "1"), 1),
]
every = pytest.mark.parametrize("known", TABLE, ids=lambda known: known.id)


def choose(environment: Gymnasium, number: int) -> Transition:
    return environment.step(Action("", choice=number))


@every
def test_the_frame_the_instruction_and_the_choices_are_shown(
    known: Known, make: Make, texts: Callable[..., list[str]]
) -> None:
    observation = make(known.id, **known.options).reset(seed=0, example=None)

    [image] = observation.images
    assert image.size == known.size
    assert image.pixels.std() > 5
    assert observation.choices == known.choices
    assert [message.role for message in observation.messages] == ["user"]
    assert all(known.says and known.says in text for text in texts(observation))
    assert len(texts(observation)) == (known.says is not None)


@every
def test_the_frame_changes_with_the_state(known: Known, make: Make) -> None:
    environment = make(known.id, **known.options)
    [before] = environment.reset(seed=0, example=None).images

    after = before
    for _ in range(4):  # a pole falls slowly: less than a pixel in its first step
        transition = choose(environment, known.moves)
        assert transition.observation is not None
        assert not transition.done
        if (after := transition.observation.images[0]) != before:
            break

    assert after != before


@every
def test_an_episode_is_that_of_gymnasium_itself(known: Known, make: Make) -> None:
    environment = make(known.id, turn_limit=7, **known.options)
    environment.reset(seed=3, example=None)
    plain = gymnasium.make(known.id, render_mode="rgb_array", max_episode_steps=7, **known.options.get("kwargs", {}))
    plain.reset(seed=3)
    for turn in range(7):
        number = turn % len(known.choices)
        _, reward, terminated, truncated, _ = plain.step(number)
        frame: Any = plain.render()

        transition = choose(environment, number)

        assert (transition.reward, transition.terminated, transition.truncated) == (reward, terminated, truncated)
        assert {type(transition.terminated), type(transition.truncated)} == {bool}
        assert type(transition.reward) is float
        assert transition.parsed
        assert transition.observation is not None
        assert np.array_equal(transition.observation.images[0].pixels, frame)
        json.dumps(dict(transition.info), allow_nan=False)
        if transition.done:
            break
    assert transition.done


@every
def test_a_seed_is_an_episode_whatever_was_played_before(known: Known, make: Make) -> None:
    environment = make(known.id, **known.options)
    first = environment.reset(seed=2**63 - 1, example=None)
    for number in range(len(known.choices)):
        if choose(environment, number).done:
            break

    assert environment.reset(seed=2**63 - 1, example=None) == first
    assert make(known.id, **known.options).reset(seed=2**63 - 1, example=None) == first


def test_seeds_make_different_episodes(make: Make) -> None:
    environment = make("MiniGrid-Empty-Random-6x6-v0", **SMALL)
    assert len({environment.reset(seed=seed, example=None).images[0].digest for seed in range(20)}) > 5


def test_an_environment_that_takes_only_32_bits_gets_32(make: Make, dial: Callable[..., str]) -> None:
    environment = make(dial(seeds=2**32))
    environment.reset(seed=2**40 + 5, example=None)
    assert environment._environment.unwrapped.seed == 5  # type: ignore[attr-defined]


def test_success_is_what_the_environment_says(make: Make, dial: Callable[..., str]) -> None:
    for info, expected in [
        ({"success": np.float64(1)}, {"success": True}),
        ({"is_success": False}, {"success": False}),
        ({"success": np.zeros(3)}, {}),
        ({}, {}),
    ]:
        environment = make(dial(info=info, length=1))
        environment.reset(seed=0, example=None)
        assert choose(environment, 0).info == expected


def test_success_may_be_that_the_episode_terminated(make: Make) -> None:
    path = [0, *[1] * 11, 2]  # up, along the cliff, down
    environment = make("CliffWalking-v1", success="terminated", frame_size=[96, 32])
    environment.reset(seed=0, example=None)

    transitions = [choose(environment, number) for number in path]

    assert [transition.info["success"] for transition in transitions] == [False] * 12 + [True]
    assert sum(transition.reward for transition in transitions) == -13
    assert transitions[-1].terminated
    assert not transitions[-1].truncated
    assert transitions[-1].observation is not None


def test_only_what_is_plain_is_kept_of_the_info(make: Make, dial: Callable[..., str]) -> None:
    info = {
        "steps": np.int64(3),
        "share": np.float32(0.5),
        "place": "hall",
        "open": np.bool_(True),
        "mask": np.ones(3),
        "generator": np.random.default_rng(0),
        "distance": float("inf"),
        "nothing": None,
    }
    environment = make(dial(info=info))
    environment.reset(seed=0, example=None)

    kept = choose(environment, 0).info

    assert kept == {"steps": 3, "share": 0.5, "place": "hall", "open": True}
    assert {type(value) for value in kept.values()} == {int, float, str, bool}


def test_a_turn_limit_takes_the_place_of_the_registered_one(make: Make) -> None:
    environment = make("MiniGrid-Empty-Random-6x6-v0", turn_limit=3, **SMALL)
    environment.reset(seed=0, example=None)

    transitions = [choose(environment, 0) for _ in range(3)]

    assert [transition.truncated for transition in transitions] == [False, False, True]
    assert not any(transition.terminated for transition in transitions)
    assert all(transition.observation is not None and transition.observation.images for transition in transitions)


def test_wrappers_are_applied_in_order(make: Make) -> None:
    environment = make(
        "MiniGrid-Empty-Random-6x6-v0",
        wrappers=["minigrid.wrappers:ImgObsWrapper", {"wrapper": "gymnasium.wrappers:TransformReward", "func": len}],
    )
    wrapped: Any = environment._environment
    assert type(wrapped).__name__ == "TransformReward"
    assert wrapped.func is len
    assert type(wrapped.env).__name__ == "ImgObsWrapper"


class Halves(gymnasium.ActionWrapper[Any, Any, Any]):
    """Pushes a continuous environment with -level, 0 or level."""

    def __init__(self, env: gymnasium.Env[Any, Any], level: float) -> None:
        super().__init__(env)
        self.level = level
        self.action_space = spaces.Discrete(3, start=-1)

    def action(self, action: Any) -> Any:
        return np.array([action * self.level], np.float32)


def test_a_wrapper_may_make_a_continuous_environment_discrete(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "halves", sys.modules[__name__])
    environment = make("Pendulum-v1", wrappers=[{"wrapper": "halves:Halves", "level": 0.5}], frame_size=50)

    observation = environment.reset(seed=0, example=None)

    assert observation.choices == ("-1", "0", "1")
    assert choose(environment, 0).reward < 0


def test_it_needs_no_display_and_prints_nothing() -> None:
    code = (
        "import os; [os.environ.pop(name, None) for name in ('DISPLAY', 'WAYLAND_DISPLAY', 'SDL_VIDEODRIVER')]\n"
        "from rllava_core.config import TaskSection\n"
        "from rllava_gymnasium.config import GymnasiumConfig\n"
        "from rllava_gymnasium.environment import Gymnasium\n"
        "Gymnasium(GymnasiumConfig(id='FrozenLake-v1'), TaskSection()).reset(seed=0, example=None)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == ""
    assert done.stderr == ""


def test_a_process_that_has_rendered_can_be_killed() -> None:
    """SDL, which draws FrozenLake, would otherwise take SIGTERM for itself."""
    code = (
        "import os, signal, time; os.environ.pop('SDL_NO_SIGNAL_HANDLERS', None)\n"
        "from rllava_core.config import TaskSection\n"
        "from rllava_gymnasium.config import GymnasiumConfig\n"
        "from rllava_gymnasium.environment import Gymnasium\n"
        "Gymnasium(GymnasiumConfig(id='FrozenLake-v1'), TaskSection()).reset(seed=0, example=None)\n"
        "os.kill(os.getpid(), signal.SIGTERM)\n"
        "time.sleep(5)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGTERM
