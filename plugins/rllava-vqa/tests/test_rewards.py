"""Which answers are right."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from rllava_core.errors import RewardError
from rllava_core.mdp.examples import Example
from rllava_core.mdp.rewards import Reward
from rllava_core.mdp.trajectory import ActionSegment, ContextSegment, Trajectory, conversation
from rllava_vqa.config import AnswerFormatConfig, ContainsConfig, ExactMatchConfig, NumericConfig
from rllava_vqa.rewards import AnswerFormat, Contains, ExactMatch, Numeric


def episode(answer: str, expected: str | None = "cat", ended: bool = True, example: bool = True) -> Trajectory:
    return Trajectory(
        example=Example("train.jsonl:3", answer=expected) if example else None,
        seed=5,
        group=0,
        turns=conversation(
            [
                ContextSegment((1,)),
                ActionSegment((2,), np.zeros(1, np.float32), text=expected or ""),
                ContextSegment((1,)),
                ActionSegment((2,), np.zeros(1, np.float32), text=answer, ended=ended),
            ]
        ),
        terminated=True,
    )


def exact_match(answer: str, expected: str = "cat", **options: Any) -> float:
    return ExactMatch(ExactMatchConfig(**options))([episode(answer, expected)])[0]


def answer_format(answer: str, **options: Any) -> float:
    return AnswerFormat(AnswerFormatConfig(**options))([episode(answer)])[0]


def contains(answer: str, expected: str = "cat", **options: Any) -> float:
    return Contains(ContainsConfig(**options))([episode(answer, expected)])[0]


def numeric(answer: str, expected: str = "42", **options: Any) -> float:
    return Numeric(NumericConfig(**options))([episode(answer, expected)])[0]


ALL: list[Reward] = [
    ExactMatch(ExactMatchConfig()),
    AnswerFormat(AnswerFormatConfig()),
    Contains(ContainsConfig()),
    Numeric(NumericConfig()),
]


def name(reward: Reward) -> str:
    return type(reward).__name__


@pytest.mark.parametrize("reward", ALL, ids=name)
def test_one_value_for_each_trajectory_in_order(reward: Reward) -> None:
    batch = [episode("42", "42"), episode("an other", "42"), episode("42", "42")]
    assert reward(batch) == [1.0, 0.0, 1.0]
    assert reward([]) == []


@pytest.mark.parametrize(
    "pair",
    [
        (ExactMatch, ExactMatchConfig),
        (AnswerFormat, AnswerFormatConfig),
        (Contains, ContainsConfig),
        (Numeric, NumericConfig),
    ],
    ids=lambda pair: pair[0].__name__,
)
def test_an_answer_that_was_cut_scores_nothing_unless_allowed(pair: tuple[Any, Any]) -> None:
    reward, config = pair
    cut = [episode("42", "42", ended=False)]
    assert reward(config())(cut) == [0.0]
    assert reward(config(require_end=False))(cut) == [1.0]


@pytest.mark.parametrize("reward", [ALL[0], ALL[2], ALL[3]], ids=name)
def test_an_example_without_an_answer_is_named(reward: Reward) -> None:
    with pytest.raises(RewardError, match=r"train\.jsonl:3 has no answer to compare with"):
        reward([episode("7", "7"), episode("cat", None)])
    with pytest.raises(RewardError, match="episode with seed 5 has no answer"):
        reward([episode("cat", example=False)])


def test_the_format_needs_no_right_answer() -> None:
    assert AnswerFormat(AnswerFormatConfig())([episode("cat", None), episode("a cat", example=False)]) == [1.0, 0.0]


# exact_match


@pytest.mark.parametrize(
    ("answer", "value"), [("cat", 1.0), (" cat\n", 1.0), ("Cat", 0.0), ("cats", 0.0), ("a cat", 0.0), ("", 0.0)]
)
def test_exact_match(answer: str, value: float) -> None:
    assert exact_match(answer) == value


def test_exact_match_can_ignore_case_and_heed_white_space() -> None:
    assert exact_match("CAT", ignore_case=True) == 1.0
    assert exact_match("STRASSE", "Straße", ignore_case=True) == 1.0
    assert exact_match("cat ", strip=False) == 0.0
    assert exact_match("cat", " cat ") == 1.0


def test_text_that_looks_the_same_is_the_same() -> None:
    assert exact_match("cafe\u0301", "caf\u00e9") == 1.0
    assert contains("one cafe\u0301", "caf\u00e9") == 1.0


# answer_format


@pytest.mark.parametrize(("answer", "value"), [("cat", 1.0), ("42.", 1.0), ("a cat", 0.0), (" cat", 0.0), ("", 0.0)])
def test_by_default_one_word_is_the_format(answer: str, value: float) -> None:
    assert answer_format(answer) == value


@pytest.mark.parametrize(
    ("answer", "value"),
    [
        ("<think>hm</think><answer>7</answer>", 1.0),
        ("so <think>hm</think><answer>7</answer>", 0.0),
        ("<think>hm</think><answer>7</answer>\n", 0.0),
        ("<think>hm</think>", 0.0),
    ],
)
def test_the_whole_answer_has_to_match(answer: str, value: float) -> None:
    assert answer_format(answer, pattern=r"<think>.*</think><answer>\d+</answer>") == value


@pytest.mark.parametrize("pattern", ["(", "[z-a]", "*", "a{99999999999}"])
def test_a_pattern_that_is_none_is_a_config_error(pattern: str) -> None:
    with pytest.raises(ValidationError, match="is not a regular expression"):
        AnswerFormatConfig(pattern=pattern)


# contains


@pytest.mark.parametrize(
    ("answer", "expected", "value"),
    [
        ("It is a cat.", "cat", 1.0),
        ("CAT!", "cat", 1.0),
        ("concatenate", "cat", 0.0),
        ("cat_1", "cat", 0.0),
        ("the answer is 7", "7", 1.0),
        ("7.", "7", 1.0),
        ("7, or so", "7", 1.0),
        ("17", "7", 0.0),
        ("7.5", "7", 0.0),
        ("2.7", "7", 0.0),
        ("7,000", "7", 0.0),
        ("a traffic light there", "traffic light", 1.0),
        ("what? (c++)", "c++", 1.0),
        ("abc", "a.c", 0.0),
        ("", "cat", 0.0),
    ],
)
def test_contains(answer: str, expected: str, value: float) -> None:
    assert contains(answer, expected) == value


def test_contains_can_heed_case_and_look_inside_words() -> None:
    assert contains("a Cat", ignore_case=False) == 0.0
    assert contains("concatenate", whole_word=False) == 1.0


def test_contains_refuses_an_empty_answer_which_any_text_holds() -> None:
    with pytest.raises(RewardError, match=r"train\.jsonl:3 is empty"):
        contains("anything", " ")


# numeric


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("42", "42"),
        ("42.", "42"),
        ("42.0", "42"),
        ("The answer is 42!", "42"),
        ("6 times 7 is 42", "42"),
        ("$42", "42"),
        ("\\boxed{42}", "42"),
        ("42cm", "42 cm"),
        ("Answer:42", "42"),
        ("A.42", "42"),
        ("+42", "42"),
        ("-42", "-42"),
        ("\N{MINUS SIGN}42", "-42"),
        ("x = -42", "-42"),
        ("5-3", "3"),
        ("(5)-3", "3"),
        ("item-3", "3"),
        ("1,234.5", "1234.5"),
        ("1234.5", "1,234.5"),
        ("-1,234,567", "-1234567"),
        ("3, 4", "4"),
        ("3,4", "4"),
        ("1,2345", "2345"),
        (".5", "0.5"),
        ("-.5", "-0.5"),
        ("50%", "0.5"),
        ("50 %", "50%"),
        ("0.5", "50%"),
        ("1/2", "0.5"),
        ("-3/4", "-0.75"),
        ("3 / 4", "0.75"),
        ("0.25", "1/4"),
        ("1e-3", "0.001"),
        ("2.5E+2", "250"),
        ("version 1.2.3 costs 9", "9"),
        ("x2 is 3", "3"),
    ],
)
def test_numeric_reads(answer: str, expected: str) -> None:
    assert numeric(answer, expected) == 1.0


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("", "42"),
        ("forty-two", "42"),
        ("41", "42"),
        ("42 or 43", "42"),
        ("-42", "42"),
        ("4.2", "42"),
        ("142", "42"),
        ("50", "0.5"),
        ("x42", "42"),
        ("1.2.42", "42"),
        ("nan", "0"),
        ("NaN", "42"),
        ("inf", "42"),
        ("1/0", "42"),
        ("0/0", "0"),
        ("1e999", "42"),
        ("1e999/1e999", "1"),
        ("-1e999", "-42"),
        ("9" * 5000, "42"),
    ],
)
def test_numeric_refuses(answer: str, expected: str) -> None:
    assert numeric(answer, expected) == 0.0


def test_numeric_tolerance_is_the_wider_of_the_two() -> None:
    assert numeric("42.0000005") == 1.0
    assert numeric("42.00001") == 0.0
    assert numeric("42.4", absolute=0.5) == 1.0
    assert numeric("42.6", absolute=0.5) == 0.0
    assert numeric("44", relative=0.05) == 1.0
    assert numeric("45", relative=0.05) == 0.0
    assert numeric("-44", "-42", relative=0.05) == 1.0
    assert numeric("42", absolute=0) == 1.0


@pytest.mark.parametrize("expected", ["", "cat", "1 or 2", "1 1/2", "nan", "inf", "1/0", "1e999"])
def test_numeric_refuses_an_example_without_one_number(expected: str) -> None:
    with pytest.raises(RewardError, match=r"of example train\.jsonl:3 cannot be compared with; expected exactly one"):
        numeric("1", expected)


@pytest.mark.parametrize("options", [{"absolute": -1}, {"relative": float("nan")}, {"absolute": float("inf")}])
def test_a_tolerance_is_a_distance(options: dict[str, float]) -> None:
    with pytest.raises(ValidationError):
        NumericConfig(**options)
