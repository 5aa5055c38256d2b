"""The options of every component of this package. Imports neither torch nor a reader."""

from __future__ import annotations

import re

from pydantic import Field, field_validator

from rllava_core.config import Options


class DigitsConfig(Options):
    """Options of the data set `digits`."""

    question: str = Field(default="Which digit?", description="what every example asks; a prompt names it {question}")


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
