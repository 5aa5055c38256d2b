"""The text beside the frame: where it comes from, when it is shown again, and templates that cannot be filled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from rllava_core.errors import ConfigError, DataError
from rllava_core.mdp.examples import Example
from rllava_core.mdp.messages import Action, ImagePart, TextPart
from rllava_gymnasium.environment import Gymnasium
from rllava_gymnasium.wording import texts_of

Make = Callable[..., Gymnasium]
Dial = Callable[..., str]
Texts = Callable[..., list[str]]


def test_texts_of_an_observation() -> None:
    assert texts_of({"mission": "go", "image": [1], "direction": 2}) == {"instruction": "go", "mission": "go"}
    assert texts_of({"a": "one", "b": "two"}) == {"instruction": "one\ntwo", "a": "one", "b": "two"}
    assert texts_of({"instruction": "go", "hint": "left"}) == {"instruction": "go", "hint": "left"}
    assert texts_of("go") == {"instruction": "go"}
    assert texts_of({"image": [1]}) == texts_of(3) == texts_of(None) == {}


def shown(make: Make, texts: Texts, identifier: str, turns: int = 4, **options: Any) -> list[list[str]]:
    """The texts of each turn of an episode."""
    environment = make(identifier, **options)
    observations = [environment.reset(seed=0, example=None)]
    observations += [environment.step(Action("", choice=0)).observation for _ in range(turns - 1)]
    return [texts(observation) for observation in observations]


def test_with_all_the_history_in_sight_a_text_is_shown_once(make: Make, dial: Dial, texts: Texts) -> None:
    assert shown(make, texts, dial(says="go")) == [["go"], [], [], []]


def test_with_a_limited_history_it_is_shown_in_every_turn(make: Make, dial: Dial, texts: Texts) -> None:
    assert shown(make, texts, dial(says="go"), task={"history": 1}) == [["go"]] * 4
    assert shown(make, texts, dial(says="go"), task={"history": 2}) == [["go"]] * 4


def test_a_text_that_changes_is_shown_again(make: Make, dial: Dial, texts: Texts) -> None:
    says = [{"mission": text} for text in ("go", "go", "stop", "go")]
    assert shown(make, texts, dial(says=says)) == [["go"], [], ["stop"], ["go"]]


def test_a_new_episode_shows_it_again(make: Make, dial: Dial, texts: Texts) -> None:
    environment = make(dial(says="go"))
    for _ in range(2):
        assert texts(environment.reset(seed=0, example=None)) == ["go"]
        environment.step(Action("", choice=0))


def test_a_frame_is_there_in_every_turn(make: Make, dial: Dial) -> None:
    environment = make(dial(says="go"), text="Look: {image} Now {instruction}")
    first = environment.reset(seed=0, example=None)
    later = environment.step(Action("", choice=0)).observation
    assert later is not None
    assert [type(part) for part in first.messages[0].parts] == [TextPart, ImagePart, TextPart]
    assert [type(part) for part in later.messages[0].parts] == [ImagePart]


def test_without_an_instruction_the_frame_is_shown_alone(make: Make, dial: Dial, texts: Texts) -> None:
    assert shown(make, texts, dial()) == [[], [], [], []]


def test_a_template_names_the_actions_and_the_texts_by_their_keys(make: Make, dial: Dial, texts: Texts) -> None:
    identifier = dial(says={"mission": "go", "hint": "east"})
    [first, *_] = shown(make, texts, identifier, text="{mission} ({hint}): {actions} {{}}", actions=["a", "b", "c"])
    assert first == ["go (east): a, b, c {}"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{misson}", r"names \{misson\}, .* it may name: \{actions\}, \{instruction\}, \{mission\}, \{image\}"),
        ("{image} {image}", r"names \{image\} more than once"),
    ],
)
def test_a_template_that_cannot_be_filled_is_refused(text: str, message: str, make: Make, dial: Dial) -> None:
    with pytest.raises(ConfigError, match=rf"task\.environment\.text: {message}"):
        make(dial(says={"mission": "go"}), text=text)


def test_an_instruction_that_is_asked_for_must_be_there(make: Make, dial: Dial) -> None:
    with pytest.raises(ConfigError, match=r"names \{instruction\}, which this environment does not say"):
        make(dial(), text="Your task: {instruction}")


def test_an_example_may_say_more(make: Make, dial: Dial, texts: Texts) -> None:
    environment = make(dial(says={"mission": "go"}), text="{mission} {style}", task={"dataset": "styles"})

    observation = environment.reset(seed=0, example=Example("styles:1", {"style": "slowly", "mission": "not this"}))
    assert texts(observation) == ["go slowly"]
    with pytest.raises(DataError, match=r"styles:2: task\.environment\.text names \{style\}"):
        environment.reset(seed=0, example=Example("styles:2"))
