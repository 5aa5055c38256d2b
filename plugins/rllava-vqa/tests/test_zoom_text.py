"""Looking again in free text: what is read, and what is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest
from pydantic import ValidationError

from rllava_core.config import TaskSection
from rllava_core.errors import DataError
from rllava_core.mdp.examples import Example
from rllava_core.mdp.messages import Action, Observation, TextPart, Transition
from rllava_core.testing import samples
from rllava_vqa.config import ZoomTextConfig
from rllava_vqa.environments.zoom_text import ZoomText

EXAMPLE = Example("train.jsonl:7", {"question": "Which?"}, (samples.picture(0, width=40, height=20),), "a cat")

EXPECTED = "Expected: zoom x0 y0 x1 y1 with 0 <= x0 < x1 <= 40, 0 <= y0 < y1 <= 20, or answer TEXT"


def zoom_text(task: dict[str, Any] | None = None, **options: Any) -> ZoomText:
    """At the beginning of an episode."""
    section = TaskSection.model_validate(task or {})
    environment = ZoomText(ZoomTextConfig.model_validate({"overview_size": 4} | options), section)
    environment.reset(seed=0, example=EXAMPLE)
    return environment


def say(text: str, environment: ZoomText | None = None, **action: Any) -> Transition:
    return (environment or zoom_text()).step(Action(text, **action))


def told(observation: Observation | None) -> str:
    assert observation is not None
    parts = [part for message in observation.messages for part in message.parts]
    return " ".join(part.text for part in parts if isinstance(part, TextPart))


@pytest.mark.parametrize(
    "text",
    ["zoom 10 2 30 12", " Zoom  10 2 30 12\n", "ZOOM: 10, 2, 30, 12", "zoom 10.0 2.9 29.5 12", "zoom +10,2,30,12"],
)
def test_a_zoom_names_pixels_of_the_whole_image(text: str) -> None:
    transition = say(text)
    assert transition.observation is not None
    (crop,) = transition.observation.images
    assert (crop.pixels == samples.picture(0, width=40, height=20).pixels[2:12, 10:30]).all()
    assert (transition.reward, transition.terminated, transition.parsed) == (-0.05, False, True)
    assert transition.info == {"success": False, "zooms": 1, "box": [10, 2, 30, 12]}
    assert transition.observation.choices is None


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("answer a cat", True),
        (" Answer:  a cat ", True),
        ("answer : a cat", True),
        ("answer\na cat", True),
        ("answer A cat", False),
        ("answer a cat, I think", False),
        ("answer zoom 0 0 2 2", False),
    ],
)
def test_an_answer_is_judged_and_ends_the_episode(text: str, right: bool) -> None:
    transition = say(text)
    assert (transition.reward, transition.terminated, transition.parsed) == (float(right), True, True)
    assert transition.info == {"success": right, "zooms": 0}


@pytest.mark.parametrize(
    "text",
    ["", "a cat", "answer", "answer: ", "answers a cat", "zoom", "zoom 1 2 3", "zoom 1 2 3 4 5", "zoom a b c d",
     "please zoom 0 0 2 2", "zoom 0 0 2 2 answer 7", "zoom 0x1 0 2 2", "zoom ² 0 2 2",
     "zoom" + " " * 50_000 + "x", samples.NONSENSE],
)  # fmt: skip
def test_any_other_text_is_refused_with_what_was_expected(text: str) -> None:
    transition = say(text, zoom_text(refusal_penalty=0.25))
    assert (transition.reward, transition.terminated, transition.parsed) == (-0.25, False, False)
    assert told(transition.observation) == EXPECTED
    assert json.loads(json.dumps(transition.info)) == {"success": False, "zooms": 0}


@pytest.mark.parametrize(
    "box", ["-1 0 10 10", "0 0 41 10", "0 0 10 21", "50 50 60 60", "10 0 10 10", "10 5 20 2", f"0 0 {'9' * 5000} 1"]
)
def test_a_crop_outside_the_image_is_refused_and_told(box: str) -> None:
    transition = say(f"zoom {box}", zoom_text(refusal_penalty=0.25))
    assert (transition.reward, transition.terminated, transition.parsed) == (-0.25, False, False)
    assert told(transition.observation) == f"There is no such region in the image. {EXPECTED}"


def test_a_crop_of_which_no_image_can_be_made_is_refused() -> None:
    example = Example("wide", {"question": "?"}, (samples.picture(0, width=300, height=9),), "a")
    environment = zoom_text()
    environment.reset(seed=0, example=example)
    assert not say("zoom 0 0 201 1", environment).parsed


@pytest.mark.parametrize("text", ["answer a cat", "zoom 0 0 2 2"])
def test_a_text_that_was_cut_is_refused_whatever_it_says(text: str) -> None:
    transition = say(text, ended=False)
    assert not transition.parsed
    assert told(transition.observation) == f"Your text was cut off. {EXPECTED}"


def test_after_the_last_zoom_only_an_answer_is_read() -> None:
    environment = zoom_text(zoom_limit=2, turn_cost=0.0)
    first, second = (say("zoom 0 0 9 9", environment) for _ in range(2))
    assert told(first.observation) == ""
    assert told(second.observation) == "No zoom is left. Expected: answer TEXT"
    assert say("answer a cat", environment).info == {"success": True, "zooms": 2}


def test_a_refusal_takes_a_turn_and_the_last_one_ends_the_episode() -> None:
    environment = zoom_text(zoom_limit=2)
    turns = [say(text, environment) for text in ("what?", "zoom 0 0 99 99", "zoom 0 0 9 9")]
    assert [(turn.terminated, turn.parsed, turn.reward) for turn in turns] == [
        (False, False, -0.1),
        (False, False, -0.1),
        (True, False, -0.1),
    ]
    assert told(turns[1].observation).endswith("No zoom is left. Expected: answer TEXT")
    assert turns[2].observation is None
    assert turns[2].info == {"success": False, "zooms": 0}


def test_without_zooms_the_first_turn_is_the_last() -> None:
    assert say("zoom 0 0 9 9", zoom_text(zoom_limit=0)).terminated
    assert say("answer a cat", zoom_text(zoom_limit=0)).reward == 1.0


def test_with_a_limited_history_question_and_overview_come_again_after_a_refusal() -> None:
    observation = say("what?", zoom_text({"history": 1})).observation
    assert observation is not None
    assert told(observation) == f"Which? {EXPECTED}"
    assert [image.size for image in observation.images] == [(4, 2)]


def test_with_a_limited_history_the_question_comes_with_every_crop() -> None:
    assert told(say("zoom 0 0 9 9", zoom_text({"history": 1})).observation) == "Which?"


def test_it_needs_no_choices_but_an_answer_and_one_image() -> None:
    environment = zoom_text({"prompt": "{question} {width}x{height}"})
    assert told(environment.reset(seed=1, example=EXAMPLE)) == "Which? 40x20"
    for example in (None, Example("a", {"question": "?"}, (), "b"), Example("a", {"question": "?"}, EXAMPLE.images)):
        with pytest.raises(DataError):
            environment.reset(seed=0, example=example)


@pytest.mark.parametrize("options", [{"refusal_penalty": -1}, {"zoom_names": ["A"]}, {"grid": [2, 2]}])
def test_options_that_make_no_sense_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        ZoomTextConfig.model_validate(options)
