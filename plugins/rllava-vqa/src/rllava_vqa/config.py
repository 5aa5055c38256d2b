"""The options of every component of this package. Imports neither torch nor a reader."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import Field, field_validator, model_validator

from rllava_core.config import Options


class DigitsConfig(Options):
    """Options of the data set `digits`."""

    question: str = Field(default="Which digit?", description="what every example asks; a prompt names it {question}")


class DigitScenesConfig(Options):
    """Options of the data set `digit_scenes`."""

    question: str = Field(default="Which digit?", description="what every example asks; a prompt names it {question}")
    distractors: int = Field(default=3, ge=0, le=3, description="cells that hold a stroke of the pen and no digit")
    close_ups: float = Field(
        default=0.0, ge=0, le=1, description="share of the scans to train on that are examples of their own as well"
    )


class JsonLinesConfig(Options):
    """Options of the data set `jsonl`."""

    path: str = Field(description="JSONL file of the examples, relative to the current directory")
    held_out_path: str | None = Field(
        default=None, description="JSONL file of the held-out examples; null splits them off `path`"
    )
    held_out_fraction: float = Field(
        default=0.1,
        ge=0,
        lt=1,
        description="share of `path` held out where `held_out_path` is null; the same lines in every run; 0 for none",
    )
    image: str | None = Field(
        default="image",
        description="column of an image path or a list of them (null or [] on a line: no image); null: none",
    )
    question: str | None = Field(
        default="question", description="column of the question, which a prompt names {question}; null: there is none"
    )
    answer: str | None = Field(
        default="answer", description="column of the right answer, text or a number; null: there is none"
    )
    choices: str | None = Field(
        default=None,
        description="column of a list of possible answers, the right one among them; null: answers are free text",
    )
    boxes: str | None = Field(
        default=None,
        description="column of a list of regions [x0, y0, x1, y1] of the line's one image, in pixels; null: none",
    )
    root: str | None = Field(
        default=None, description="folder that relative image paths refer to; null: the folder of the JSONL file"
    )
    verify_images: bool = Field(
        default=True, description="decode every image once before the run, so that a damaged one stops it at once"
    )


class ClassFolderConfig(Options):
    """Options of the data set `folder`."""

    path: str = Field(description="folder with one sub-folder of images for each answer")
    question: str = Field(default="What is shown?", description="what every example asks; a prompt names it {question}")
    held_out_fraction: float = Field(
        default=0.1,
        ge=0,
        lt=1,
        description="share of each sub-folder held out, the same files in every run; 0 for none",
    )
    classes_as_choices: bool = Field(
        default=False, description="let the policy choose among the names of the sub-folders instead of writing text"
    )
    verify_images: bool = Field(
        default=True, description="decode every image once before the run, so that a damaged one stops it at once"
    )


class LookAgainConfig(Options):
    """What the environments `zoom` and `zoom_text` share."""

    overview_size: int = Field(
        default=64, ge=1, description="pixels of the overview's longer side; choose it so that the answer is lost in it"
    )
    view_size: int | None = Field(
        default=None,
        ge=1,
        description="overview and crops of a shorter longer side are enlarged to this many pixels (the overview as "
        "squares, a crop bicubically); null: they are left to the model's processor",
    )
    zoom_limit: int = Field(
        default=4, ge=0, description="turns without an answer, after which only an answer is left; 0: no zoom at all"
    )
    turn_cost: float = Field(default=0.05, ge=0, allow_inf_nan=False, description="taken off the reward by every zoom")
    crop_prompt: str | None = Field(
        default=None,
        description="what comes with a crop, written like task.prompt; null: nothing where task.history is `all`, "
        "else task.prompt",
    )


class ZoomConfig(LookAgainConfig):
    """Options of the environment `zoom`."""

    grid: tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]] = Field(
        default=(2, 2), description="columns and rows of regions, for examples without the field `boxes`"
    )
    zoom_names: str | tuple[str, ...] = Field(
        default="zoom {number}",
        description="names of the regions among the choices: a pattern with {number}, which counts from 1, or a list",
    )

    @field_validator("zoom_names")
    @classmethod
    def _names_differ(cls, names: str | tuple[str, ...]) -> str | tuple[str, ...]:
        if isinstance(names, str):
            if "{number}" not in names:
                raise ValueError(f"{names!r} lacks {{number}}, so all regions would have one name")
        elif not names or len(set(names)) < len(names) or "" in names:
            raise ValueError("needs different, non-empty names")
        return names

    @model_validator(mode="after")
    def _every_cell_has_a_name(self) -> ZoomConfig:
        cells = self.grid[0] * self.grid[1]
        if not isinstance(self.zoom_names, str) and len(self.zoom_names) < cells:
            raise ValueError(f"zoom_names has {len(self.zoom_names)} names for the {cells} cells of the grid")
        return self


class ZoomTextConfig(LookAgainConfig):
    """Options of the environment `zoom_text`."""

    refusal_penalty: float = Field(
        default=0.1,
        ge=0,
        allow_inf_nan=False,
        description="taken off the reward by a text that is neither a zoom inside the image nor an answer",
    )


class AnswerOptions(Options):
    """What all rewards of an answer share."""

    require_end: bool = Field(default=True, description="an answer that was cut at the token limit scores 0")


class ExactMatchConfig(AnswerOptions):
    """Options of the reward `exact_match`."""

    ignore_case: bool = Field(default=False, description="'Yes' equals 'yes'")
    strip: bool = Field(default=True, description="white space around the answers does not count")


class AnswerFormatConfig(AnswerOptions):
    """Options of the reward `answer_format`."""

    pattern: str = Field(
        default=r"\S+",
        description="regular expression (Python's) that the whole answer must match; keep nested repeats out of it, "
        "they can take exponential time",
    )

    @field_validator("pattern")
    @classmethod
    def _compiles(cls, pattern: str) -> str:
        try:
            re.compile(pattern)
        except (re.error, OverflowError, RecursionError) as error:
            raise ValueError(f"{pattern!r} is not a regular expression: {error}") from None
        return pattern


class ContainsConfig(AnswerOptions):
    """Options of the reward `contains`."""

    ignore_case: bool = Field(default=True, description="'Cat' contains 'cat'")
    whole_word: bool = Field(default=True, description="'concatenate' does not contain 'cat', nor '7.5' the number '7'")


class NumericConfig(AnswerOptions):
    """Options of the reward `numeric`."""

    absolute: float = Field(default=1e-6, ge=0, allow_inf_nan=False, description="how far the number may be off")
    relative: float = Field(
        default=0.0, ge=0, allow_inf_nan=False, description="how far it may be off as a share of the right number"
    )
