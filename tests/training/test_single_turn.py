"""Prompt templates, and the one-step environment."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from rllava_core.config import Options
from rllava_core.errors import DataError
from rllava_core.mdp.examples import Example
from rllava_core.mdp.images import Image
from rllava_core.mdp.messages import Action, ImagePart, Part
from rllava_core.mdp.single_turn import SingleTurn, fill

ONE, TWO = (Image.from_array(np.full((4, 4), shade, np.uint8)) for shade in (10, 200))
FIELDS = {"question": "How many?", "count": 3, "braces": "{question} {image} {{x}}", "question two": "Two?"}


def readable(parts: tuple[Part, ...]) -> list[str]:
    """Texts as they are, images as `<1>` and `<2>`."""
    return [{ONE: "<1>", TWO: "<2>"}[part.image] if isinstance(part, ImagePart) else part.text for part in parts]


@pytest.mark.parametrize(
    ("template", "images", "expected"),
    [
        ("{question}", [], ["How many?"]),
        ("{question} One word.", [ONE], ["<1>", "How many? One word."]),
        ("{question}", [ONE, TWO], ["<1>", "<2>", "How many?"]),
        ("{image}{question}", [ONE], ["<1>", "How many?"]),
        ("A {image} and B {image}: {question}", [ONE, TWO], ["A ", "<1>", " and B ", "<2>", ": How many?"]),
        ("{question}{image}{image}", [TWO, ONE], ["How many?", "<2>", "<1>"]),
        ("{question} {count} {question}", [], ["How many? 3 How many?"]),
        ("{question two}", [], ["Two?"]),
        ("say {{yes}} or }}no{{", [ONE], ["<1>", "say {yes} or }no{"]),
        ("{{image}} {{{count}}}", [ONE], ["<1>", "{image} {3}"]),
        ("{braces}", [ONE], ["<1>", "{question} {image} {{x}}"]),
        ("lone } and {", [], ["lone } and {"]),
        ("", [ONE], ["<1>"]),
        ("", [], []),
    ],
)
def test_a_template_is_filled(template: str, images: list[Image], expected: list[str]) -> None:
    assert readable(fill(template, FIELDS, images, where="here")) == expected


@pytest.mark.parametrize("template", ["{questoin}", "{}", "{question!r}", "{count:d}", "{question.__class__}", "{0}"])
def test_what_names_no_field_is_refused_and_never_evaluated(template: str) -> None:
    with pytest.raises(DataError) as caught:
        fill(template, FIELDS, [], where="a.jsonl:3")

    assert str(caught.value) == (
        f"a.jsonl:3: task.prompt names {template}, the example has the fields: braces, count, question, question two"
    )


def test_an_example_without_fields_says_so() -> None:
    with pytest.raises(DataError, match=r"task\.prompt names \{question\}, the example has the fields: none"):
        fill("{question}", {}, [], where="here")


@pytest.mark.parametrize(("template", "slots"), [("{image}", 1), ("{image}{image}{image}", 3)])
def test_as_many_places_as_images_are_needed(template: str, slots: int) -> None:
    with pytest.raises(DataError) as caught:
        fill(template, FIELDS, [ONE, TWO], where="a.jsonl:3")

    assert str(caught.value) == (f"a.jsonl:3: task.prompt has {slots} {{image}} placeholders, the example has 2 images")


@dataclass(frozen=True)
class Task:
    prompt: str = "{question}"
    choices: tuple[str, ...] | None = None


def environment(**task: Any) -> SingleTurn:
    return SingleTurn(Options(), Task(**task))


def test_an_episode_is_one_question_and_one_answer() -> None:
    single = environment()

    observation = single.reset(seed=1, example=Example("here", {"question": "How many?"}, (ONE,), "3"))
    transition = single.step(Action("3"))

    [message] = observation.messages
    assert (message.role, readable(message.parts)) == ("user", ["<1>", "How many?"])
    assert observation.choices is None
    assert (transition.reward, transition.observation, transition.terminated) == (0.0, None, True)


def test_choices_are_the_examples_own_before_those_of_the_task() -> None:
    single = environment(choices=("yes", "no"))

    assert single.reset(seed=1, example=Example("a", {"question": "?"})).choices == ("yes", "no")
    assert single.reset(seed=1, example=Example("b", {"question": "?"}, choices=("1", "2"))).choices == ("1", "2")


def test_without_an_example_there_is_nothing_to_ask() -> None:
    with pytest.raises(DataError, match=r"set task\.dataset"):
        environment().reset(seed=1, example=None)
