"""Looking again by choice: pictures, costs, ends, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
from pydantic import ValidationError

from rllava_core.config import TaskSection
from rllava_core.errors import ConfigError, DataError
from rllava_core.mdp.examples import Example
from rllava_core.mdp.images import Image
from rllava_core.mdp.messages import Action, Observation, TextPart, Transition
from rllava_vqa.config import DigitScenesConfig, JsonLinesConfig, ZoomConfig
from rllava_vqa.datasets.digit_scenes import DigitScenes
from rllava_vqa.datasets.jsonl import JsonLines
from rllava_vqa.environments.zoom import Zoom

CORNERS = ((0, 0, 16, 8), (16, 0, 32, 8), (0, 8, 16, 16), (16, 8, 32, 16))


def an_example(**changes: Any) -> Example:
    """A picture of 32x16 pixels, a grey for each quarter."""
    pixels = np.kron(np.array([[0, 60], [120, 250]], np.uint8), np.ones((8, 16), np.uint8))
    values: dict[str, Any] = {
        "name": "train.jsonl:7",
        "fields": {"question": "Which?"},
        "images": (Image.from_array(pixels),),
        "answer": "cat",
    }
    return Example(**(values | changes))


def boxed(*boxes: Any) -> Example:
    return an_example(fields={"question": "Which?", "boxes": list(boxes)})


def zoom(task: dict[str, Any] | None = None, **options: Any) -> Zoom:
    section = TaskSection.model_validate({"choices": ["cat", "dog"]} | (task or {}))
    return Zoom(ZoomConfig.model_validate({"overview_size": 2} | options), section)


def begin(environment: Zoom, example: Example | None = None) -> Observation:
    return environment.reset(seed=0, example=an_example() if example is None else example)


def act(environment: Zoom, text: str) -> Transition:
    return environment.step(Action(text, choice=0))


def after(environment: Zoom, *texts: str, example: Example | None = None) -> Transition:
    """What the last of the actions brought."""
    begin(environment, example)
    return [act(environment, text) for text in texts][-1]


def texts(observation: Observation | None) -> list[str]:
    assert observation is not None
    return [part.text for message in observation.messages for part in message.parts if isinstance(part, TextPart)]


def the_picture(observation: Observation | None) -> np.ndarray:
    """Its grey values, [height, width]."""
    assert observation is not None
    (image,) = observation.images
    return image.pixels[:, :, 0]


def refusal(example: Example | None, task: dict[str, Any] | None = None, **options: Any) -> str:
    with pytest.raises(DataError) as caught:
        zoom(task, **options).reset(seed=0, example=example)
    return str(caught.value)


# What is shown


def test_first_comes_the_overview_with_the_question_and_all_choices() -> None:
    observation = begin(zoom())
    assert the_picture(observation).shape == (1, 2)
    assert texts(observation) == ["Which?"]
    assert observation.choices == ("zoom 1", "zoom 2", "zoom 3", "zoom 4", "cat", "dog")


def test_a_pixel_of_the_overview_is_the_mean_of_its_area() -> None:
    assert the_picture(begin(zoom())).tolist() == [[60, 155]]
    assert the_picture(begin(zoom(overview_size=4))).tolist() == [[0, 0, 60, 60], [120, 120, 250, 250]]


def test_the_overview_is_enlarged_as_squares() -> None:
    picture = the_picture(begin(zoom(view_size=8)))
    assert picture.tolist() == [[60] * 4 + [155] * 4] * 4


def test_an_image_that_is_small_already_is_its_own_overview() -> None:
    assert the_picture(begin(zoom(overview_size=64))).shape == (16, 32)


@pytest.mark.parametrize(("name", "grey"), [("zoom 1", 0), ("zoom 2", 60), ("zoom 3", 120), ("zoom 4", 250)])
def test_a_zoom_shows_a_cell_of_the_grid_in_full_resolution(name: str, grey: int) -> None:
    transition = after(zoom(), name)
    assert the_picture(transition.observation).tolist() == [[grey] * 16] * 8
    assert texts(transition.observation) == []
    assert transition.info["box"] == list(CORNERS[int(name[-1]) - 1])


def test_the_grid_has_columns_and_rows() -> None:
    environment = zoom(grid=[3, 1])
    assert begin(environment).choices == ("zoom 1", "zoom 2", "zoom 3", "cat", "dog")
    assert [after(environment, f"zoom {number}").info["box"] for number in (1, 2, 3)] == [
        [0, 0, 10, 16],
        [10, 0, 21, 16],
        [21, 0, 32, 16],
    ]


def test_boxes_of_the_example_are_the_regions() -> None:
    environment = zoom()
    example = boxed([2, 1, 5, 3], [15, 7, 17, 9], (0, 0, 32, 16))
    assert begin(environment, example).choices == ("zoom 1", "zoom 2", "zoom 3", "cat", "dog")
    assert the_picture(act(environment, "zoom 2").observation).tolist() == [[0, 60], [120, 250]]
    assert the_picture(act(environment, "zoom 1").observation).shape == (2, 3)
    assert the_picture(act(environment, "zoom 3").observation).shape == (16, 32)


def test_fractions_of_a_pixel_widen_a_box() -> None:
    assert after(zoom(), "zoom 1", example=boxed([2.5, 1.9, 4.1, 3])).info["box"] == [2, 1, 5, 3]


def test_a_small_crop_is_enlarged_and_a_large_one_is_not_reduced() -> None:
    assert the_picture(after(zoom(view_size=64), "zoom 4").observation).shape == (32, 64)
    assert the_picture(after(zoom(view_size=4), "zoom 4").observation).shape == (8, 16)


def test_regions_can_have_names() -> None:
    environment = zoom(zoom_names=["A", "B", "C", "D"])
    assert begin(environment).choices == ("A", "B", "C", "D", "cat", "dog")
    assert the_picture(act(environment, "D").observation)[0, 0] == 250
    assert begin(environment, boxed([0, 0, 2, 2])).choices == ("A", "cat", "dog")
    assert begin(zoom(zoom_names="look at {number}")).choices[0] == "look at 1"  # type: ignore[index]


def test_a_prompt_may_name_the_regions_and_the_size_of_the_image() -> None:
    environment = zoom({"prompt": "{question} {width}x{height} {regions}"}, zoom_names=["A", "B", "C", "D"])
    assert texts(begin(environment, boxed([0, 0, 2, 2], [1, 2, 3, 4]))) == ["Which? 32x16 A: 0 0 2 2; B: 1 2 3 4"]


def test_a_prompt_places_the_picture() -> None:
    observation = begin(zoom({"prompt": "See {image} {question}"}))
    assert [type(part).__name__ for part in observation.messages[0].parts] == ["TextPart", "ImagePart", "TextPart"]


def test_choices_of_the_example_come_before_those_of_the_task() -> None:
    assert begin(zoom(), an_example(choices=("cat", "cow"))).choices[-2:] == ("cat", "cow")  # type: ignore[index]


# What the policy that forgets sees


def test_with_a_limited_history_the_question_comes_with_every_crop() -> None:
    environment = zoom({"history": 1, "prompt": "{question} {image}"})
    begin(environment)
    observation = act(environment, "zoom 4").observation
    assert texts(observation) == ["Which? "]
    assert the_picture(observation)[0, 0] == 250


@pytest.mark.parametrize("history", ["all", 2])
def test_what_comes_with_a_crop_can_be_set(history: Any) -> None:
    environment = zoom({"history": history}, crop_prompt="Closer: {image}")
    assert texts(after(environment, "zoom 1").observation) == ["Closer: "]


# Rewards, costs and ends


@pytest.mark.parametrize(("answer", "right"), [("cat", True), ("dog", False)])
def test_an_answer_ends_the_episode(answer: str, right: bool) -> None:
    transition = after(zoom(), answer)
    assert (transition.reward, transition.terminated, transition.truncated) == (float(right), True, False)
    assert transition.info == {"success": right, "zooms": 0}
    assert transition.observation is None


def test_every_zoom_costs_a_little() -> None:
    environment = zoom(turn_cost=0.125)
    begin(environment)
    transitions = [act(environment, text) for text in ("zoom 1", "zoom 1", "cat")]
    assert [transition.reward for transition in transitions] == [-0.125, -0.125, 1.0]
    assert [transition.terminated for transition in transitions] == [False, False, True]
    assert [transition.info["success"] for transition in transitions] == [False, False, True]
    assert [transition.info["zooms"] for transition in transitions] == [1, 2, 2]
    assert all(transition.parsed for transition in transitions)


def test_what_is_said_of_a_step_can_be_written_as_json() -> None:
    environment = zoom()
    begin(environment)
    assert [json.loads(json.dumps(act(environment, text).info)) for text in ("zoom 2", "dog")] == [
        {"success": False, "zooms": 1, "box": [16, 0, 32, 8]},
        {"success": False, "zooms": 1},
    ]


def test_after_the_last_zoom_only_answers_are_left() -> None:
    environment = zoom(zoom_limit=2)
    begin(environment)
    first, second = (act(environment, text).observation for text in ("zoom 1", "zoom 2"))
    assert first is not None
    assert second is not None
    assert first.choices == ("zoom 1", "zoom 2", "zoom 3", "zoom 4", "cat", "dog")
    assert second.choices == ("cat", "dog")
    with pytest.raises(ValueError, match="not among the choices"):
        act(environment, "zoom 1")
    assert begin(environment).choices == first.choices, "the next episode has all zooms again"


def test_without_zooms_all_else_stays_equal() -> None:
    with_zooms, without = begin(zoom()), begin(zoom(zoom_limit=0))
    assert without.messages == with_zooms.messages
    assert without.choices == ("cat", "dog")
    assert after(zoom(zoom_limit=0), "cat").reward == 1.0


# What is refused


@pytest.mark.parametrize(
    ("box", "problem"),
    [
        ([-1, 0, 5, 5], "[-1, 0, 5, 5], which is not inside the image of 32x16 pixels"),
        ([0, 0, 33, 5], "[0, 0, 33, 5], which is not inside the image of 32x16 pixels"),
        ([0, 0, 5, 16.5], "[0, 0, 5, 16.5], which is not inside the image of 32x16 pixels"),
        ([5, 0, 5, 5], "[5, 0, 5, 5], expected [x0, y0, x1, y1] with x0 < x1 and y0 < y1"),
        ([0, 5, 5, 2], "[0, 5, 5, 2], expected [x0, y0, x1, y1] with x0 < x1 and y0 < y1"),
        ([0, 0, 5], "[0, 0, 5], expected four numbers"),
        ([0, 0, 5, "5"], '[0, 0, 5, "5"], expected four numbers'),
        ([0, 0, 5, True], "[0, 0, 5, true], expected four numbers"),
        ([0, 0, 5, float("nan")], "[0, 0, 5, NaN], expected four numbers"),
        ("0 0 5 5", '"0 0 5 5", expected four numbers'),
    ],
)
def test_a_bad_box_is_named_with_its_example(box: Any, problem: str) -> None:
    assert refusal(boxed([0, 0, 2, 2], box)).startswith(f"train.jsonl:7: boxes[1] is {problem}")


def test_a_box_of_which_no_image_can_be_made_is_refused() -> None:
    example = boxed([0, 0, 201, 1])
    wide = Example(example.name, example.fields, (Image.from_array(np.zeros((9, 300), np.uint8)),), "cat")
    assert "boxes[0] is [0, 0, 201, 1], an aspect ratio beyond 200:1" in refusal(wide)


@pytest.mark.parametrize("boxes", [[], "left", 3, {}])
def test_boxes_that_are_no_list_are_refused(boxes: Any) -> None:
    message = refusal(an_example(fields={"question": "Which?", "boxes": boxes}))
    assert message.startswith("train.jsonl:7: the field boxes is")


@pytest.mark.parametrize("count", [0, 2])
def test_an_example_has_exactly_one_image(count: int) -> None:
    message = refusal(an_example(images=an_example().images * count))
    assert message == f"train.jsonl:7: environment 'zoom' shows parts of one image, the example has {count}"


def test_examples_with_answers_and_choices_are_needed() -> None:
    assert refusal(None) == "environment 'zoom' needs examples: set task.dataset"
    assert "judges answers" in refusal(an_example(answer=None))
    assert "set task.choices" in refusal(an_example(), {"choices": None})
    assert "'cow' is not among the choices ['cat', 'dog']" in refusal(an_example(answer="cow"))


def test_an_image_smaller_than_the_grid_is_refused() -> None:
    assert "32x16 pixels cannot be cut into 40x1 cells" in refusal(an_example(), grid=[40, 1])


def test_more_boxes_than_names_are_refused() -> None:
    example = boxed(*[[0, 0, 2, 2]] * 5)
    assert "5 regions, but task.environment.zoom_names has 4 names" in refusal(example, zoom_names=["A", "B", "C", "D"])


@pytest.mark.parametrize("options", [{"zoom_names": ["A", "B", "C", "cat"]}, {"zoom_names": "{number}"}])
def test_a_region_named_like_an_answer_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="is the name of a region, too"):
        zoom({"choices": ["cat", "2"]}, **options)
    example = an_example(choices=("cat", "2"))
    assert "train.jsonl:7: the answer" in refusal(example, {"choices": None}, **options)


@pytest.mark.parametrize(
    "options",
    [
        {"zoom_names": "zoom"},
        {"zoom_names": ["A", "B", "C"]},
        {"zoom_names": ["A", "B", "B", "D"]},
        {"zoom_names": ["A", "B", "", "D"]},
        {"grid": [0, 2]},
        {"grid": [2]},
        {"zoom_limit": -1},
        {"turn_cost": -0.1},
        {"turn_cost": float("inf")},
        {"overview_size": 0},
        {"view_size": 0},
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        ZoomConfig.model_validate(options)


def test_a_step_before_the_first_reset_is_refused() -> None:
    with pytest.raises(ValueError, match="not among the choices"):
        act(zoom(), "cat")


# With data sets


def test_a_folder_of_images_with_boxes_can_be_played(tmp_path: Path) -> None:
    lines = []
    for number in range(4):
        pixels = np.zeros((20, 40, 3), np.uint8)
        pixels[4:8, 10 * number : 10 * number + 4] = 255
        PIL.Image.fromarray(pixels).save(tmp_path / f"{number}.png")
        boxes = [[10 * place, 4, 10 * place + 4, 8] for place in range(4)]
        lines.append({"image": f"{number}.png", "question": "Where?", "answer": number, "regions": boxes})
    path = tmp_path / "train.jsonl"
    path.write_text("\n".join(json.dumps(line) for line in lines), encoding="utf-8")
    data = JsonLines(JsonLinesConfig(path=str(path), boxes="regions", held_out_fraction=0.25))
    environment = zoom({"choices": ["0", "1", "2", "3"]}, zoom_limit=8)
    for example in [*data.examples("train"), *data.examples("held_out")]:
        begin(environment, example)
        seen = [the_picture(act(environment, f"zoom {place}").observation).mean() for place in range(1, 5)]
        assert sorted(seen) == [0, 0, 0, 255]
        assert act(environment, str(int(np.argmax(seen)))).info == {"success": True, "zooms": 4}


def test_who_finds_the_digit_of_a_scene_sees_its_scan() -> None:
    environment = zoom({"choices": list("0123456789")}, overview_size=8)
    example = DigitScenes(DigitScenesConfig()).examples("held_out")[3]
    assert the_picture(begin(environment, example)).shape == (8, 8)
    transition = act(environment, f"zoom {example.fields['cell']}")
    assert the_picture(transition.observation).shape == (16, 16)
    assert act(environment, str(example.answer)).reward == 1.0
