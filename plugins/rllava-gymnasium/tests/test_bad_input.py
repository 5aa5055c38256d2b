"""What is wrong with a config is said when the environment is made: the key, what is wrong, what would be right."""

from __future__ import annotations

import re
import types
from collections.abc import Callable
from typing import Any

import gymnasium
import pytest
from pydantic import ValidationError

from rllava_core.config import TaskSection
from rllava_core.errors import ConfigError
from rllava_gymnasium.config import GymnasiumConfig
from rllava_gymnasium.environment import Gymnasium
from rllava_gymnasium.finding import registered

Make = Callable[..., Gymnasium]


@pytest.mark.parametrize(
    ("identifier", "message"),
    [
        ("FrozenLak-v1", "no environment 'FrozenLak-v1' is registered; did you mean 'FrozenLake-v1'?"),
        ("cartpole-v1", "no environment 'cartpole-v1' is registered; did you mean 'CartPole-v1'?"),
        ("MiniGrid-Emty-5x5-v0", "did you mean 'MiniGrid-Empty-5x5-v0'?"),
        ("minigrid:BabyAI-GoToLocale-v0", "is registered by 'minigrid'; did you mean 'BabyAI-GoToLocal-v0'?"),
        ("CartPole", "'CartPole' has no version; did you mean 'CartPole-v1'?"),
        ("Taxi-v999", "did you mean 'Taxi-v"),
        ("Zqxj", "if a package has it that is not found, write 'module:Zqxj'"),
        ("NoSuch/Pong-v5", "install the package that has the environments of 'NoSuch'"),
        ("minigird:MiniGrid-Empty-5x5-v0", "there is no module 'minigird'; install it; did you mean 'minigrid'?"),
        ("no.such:Dial-v0", "there is no module 'no'; install it"),
        (".odd:Dial-v0", "importing '.odd' for '.odd:Dial-v0' raised TypeError"),
    ],
)
def test_an_unknown_id(identifier: str, message: str, make: Make) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)) as raised:
        make(identifier)
    assert str(raised.value).startswith("task.environment.id: ")
    assert "\n" not in str(raised.value)
    assert raised.value.exit_code == 2


def test_a_module_that_does_not_import(make: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    (tmp_path / "broken_levels.py").write_text("import no_such_physics\n", encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ConfigError, match=r"importing 'broken_levels' .* raised ModuleNotFoundError.*no_such_physics"):
        make("broken_levels:Level-v0")


def test_packages_for_gymnasium_are_imported_to_find_an_id(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {key: value for key, value in gymnasium.registry.items() if not key.startswith("MiniGrid")}
    monkeypatch.setattr(gymnasium, "registry", found)
    imported: list[str] = []

    def import_module(name: str) -> types.ModuleType:
        imported.append(name)
        found["MiniGrid-Empty-5x5-v0"] = found["FrozenLake-v1"]
        return types.ModuleType(name)

    monkeypatch.setattr("rllava_gymnasium.finding.importlib.import_module", import_module)
    assert registered("FrozenLake-v1").id == "FrozenLake-v1"
    assert imported == []
    assert registered("MiniGrid-Empty-5x5-v0") is found["FrozenLake-v1"]
    assert imported == ["minigrid"]


def test_an_environment_without_frames(make: Make, dial: Callable[..., str]) -> None:
    class Silent(gymnasium.Env[Any, Any]):
        metadata = {"render_modes": ["ansi", "human"]}

        def __init__(self, render_mode: str) -> None:
            raise AssertionError("it is not even made")

    with pytest.raises(ConfigError, match=r"task\.environment\.id: .* rgb_array, .*\(it renders ansi, human\)"):
        make(dial(entry_point=Silent))


def test_an_environment_without_frames_made_by_a_function(make: Make, dial: Callable[..., str]) -> None:
    class Mute(gymnasium.Env[Any, Any]):
        pass

    def made(render_mode: str) -> gymnasium.Env[Any, Any]:
        return Mute()

    with pytest.raises(ConfigError, match=r"does not render rgb_array, .*\(it renders nothing\)"):
        make(dial(entry_point=made))


def test_an_environment_that_ignores_the_render_mode(make: Make, dial: Callable[..., str]) -> None:
    class Deaf(gymnasium.Env[Any, Any]):
        metadata = {"render_modes": ["rgb_array"]}

        def __init__(self, render_mode: str) -> None:
            pass

    with pytest.raises(ConfigError, match=r"asked for frames \(rgb_array\), but its render mode is None"):
        make(dial(entry_point=Deaf))


def test_a_continuous_action_space(make: Make) -> None:
    with pytest.raises(ConfigError, match=r"'Pendulum-v1' is Box\(.*\) \(continuous\); supported is Discrete"):
        make("Pendulum-v1")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"id": "FrozenLake-v1", "kwargs": {"is_slipery": True}},
            "task.environment.kwargs.is_slipery: FrozenLakeEnv takes no such argument; did you mean 'is_slippery'?",
        ),
        (
            {"id": "MiniGrid-Empty-5x5-v0", "kwargs": {"tile_sice": 8}},  # an argument of the base class
            "task.environment.kwargs.tile_sice: EmptyEnv takes no such argument; did you mean 'tile_size'?",
        ),
        (
            {"id": "FrozenLake-v1", "kwargs": {"map_name": "5x5"}},
            "task.environment: making 'FrozenLake-v1' raised KeyError: '5x5'",
        ),
        (
            {"id": "FrozenLake-v1", "wrappers": ["gymnasium.wrappers:GreyscaleObservation"]},
            "task.environment.wrappers.0: 'gymnasium.wrappers:GreyscaleObservation' does not exist; did you mean "
            "'GrayscaleObservation'?",
        ),
        (
            {"id": "FrozenLake-v1", "wrappers": ["gymnasium.wrapers:TimeLimit"]},
            "task.environment.wrappers.0: 'gymnasium.wrapers:TimeLimit': there is no module 'gymnasium.wrapers'",
        ),
        (
            {"id": "FrozenLake-v1", "wrappers": ["gymnasium:Env"]},
            "task.environment.wrappers.0: 'gymnasium:Env' is no subclass of gymnasium.Wrapper",
        ),
        (
            {"id": "FrozenLake-v1", "wrappers": [{"wrapper": "gymnasium.wrappers:TimeLimit", "max_steps": 3}]},
            "task.environment.wrappers.0.max_steps: TimeLimit takes no such argument; did you mean 'max_episode_steps'",
        ),
        (
            {"id": "FrozenLake-v1", "wrappers": ["gymnasium.wrappers:TimeLimit"]},
            "task.environment.wrappers.0: 'gymnasium.wrappers:TimeLimit' around 'FrozenLake-v1' raised TypeError",
        ),
        ({"id": "FrozenLake-v1", "task": {"choices": ["a", "b"]}}, "task.choices: "),
        ({"id": "FrozenLake-v1", "task": {"prompt": "Go on."}}, "task.prompt: "),
    ],
)
def test_what_an_environment_refuses(options: dict[str, Any], message: str, make: Make) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        make(**options)


def test_an_environment_that_cannot_be_reset(make: Make, dial: Callable[..., str]) -> None:
    with pytest.raises(ConfigError, match=r"task\.environment: resetting and rendering 'Dial.*' raised ValueError"):
        make(dial(seeds=0))


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("id", "", "at least 1 character"),
        ("turn_limit", 0, "greater than or equal to 1"),
        ("unparsable_penalty", 0.5, "less than or equal to 0"),
        ("unparsable_penalty", float("-inf"), "finite number"),
        ("frame_size", 0, "pixels from 1 to 4096"),
        ("frame_size", [64], r"\[width, height\]"),
        ("frame_size", [64, 2.5], r"\[width, height\]"),
        ("frame_size", True, "pixels from 1 to 4096"),
        ("frame_size", 5000, "pixels from 1 to 4096"),
        ("kwargs", {"render_mode": "human"}, "cannot hold 'render_mode': frames are always rendered"),
        ("kwargs", {"max_episode_steps": 5}, "cannot hold 'max_episode_steps': write turn_limit"),
        ("actions", "left", "expected a list of names"),
        ("actions", ["left"], "at least two names"),
        ("actions", ["left", "Left. "], "differ in more than case"),
        ("actions", ["left", ""], "at least two names"),
        ("actions", [True, False], "YAML reads yes, no"),
        ("actions", ["left", None], "expected names, found None"),
        ("actions", {"left": "0", "right": 1}, "expected a whole number after each name"),
        ("actions", {"left": 0, "right": 0}, "two names to one action"),
        ("action_format", "json", "'choice' or 'text'"),
        ("success", "always", "'auto' or 'terminated'"),
        ("wrappers", ["TimeLimit"], "match pattern"),
        ("framesize", 64, "Extra inputs"),
    ],
)
def test_options_of_the_wrong_kind(option: str, value: Any, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        GymnasiumConfig.model_validate({"id": "FrozenLake-v1", option: value})


def test_options_as_yaml_writes_them() -> None:
    wrappers = ["a.b:C", {"wrapper": "a:D", "level": 2}]
    options = {"id": "FrozenLake-v1", "frame_size": 64, "actions": [1, 2.5, "three"], "wrappers": wrappers}
    config = GymnasiumConfig.model_validate(options)
    assert config.frame_size == (64, 64)
    assert config.actions == ("1", "2.5", "three")
    assert [(entry.wrapper, entry.arguments) for entry in config.wrappers] == [("a.b:C", {}), ("a:D", {"level": 2})]
    assert GymnasiumConfig.model_validate(config.model_dump(mode="json")) == config


def test_an_environment_does_not_work_on_the_config(dial: Callable[..., str]) -> None:
    config = GymnasiumConfig(id=dial(), kwargs={"says": ["SF", "FG"]})
    environment: Any = Gymnasium(config, TaskSection())
    environment._environment.unwrapped.settings["says"].append("HH")
    assert config.kwargs == {"says": ["SF", "FG"]}
