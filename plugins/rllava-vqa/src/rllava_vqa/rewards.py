"""Rewards of an answer: 1 if it is right, 0 if it is not.

Each judges the text of the last action. With `require_end`, an answer that was cut at the token limit scores 0: what
it would have become, nobody knows.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Sequence

from rllava_core.errors import RewardError
from rllava_core.mdp.trajectory import Trajectory
from rllava_vqa.config import AnswerFormatConfig, ContainsConfig, ExactMatchConfig, NumericConfig


class ExactMatch:
    """The answer is the example's answer.

    Raises RewardError for an example without an answer.
    """

    def __init__(self, config: ExactMatchConfig) -> None:
        self._config = config

    def __call__(self, trajectories: Sequence[Trajectory]) -> list[float]:
        return [float(self._matches(trajectory)) for trajectory in trajectories]

    def _matches(self, trajectory: Trajectory) -> bool:
        expected = self._normal(_expected(trajectory, "exact_match"))
        return _complete(trajectory, self._config.require_end) and self._normal(trajectory.answer) == expected

    def _normal(self, text: str) -> str:
        text = _normal(text, self._config.ignore_case)
        return text.strip() if self._config.strip else text


class AnswerFormat:
    """The whole answer matches the pattern, right or wrong."""

    def __init__(self, config: AnswerFormatConfig) -> None:
        self._require_end = config.require_end
        self._pattern = re.compile(config.pattern)

    def __call__(self, trajectories: Sequence[Trajectory]) -> list[float]:
        return [float(self._matches(trajectory)) for trajectory in trajectories]

    def _matches(self, trajectory: Trajectory) -> bool:
        return _complete(trajectory, self._require_end) and self._pattern.fullmatch(trajectory.answer) is not None


class Contains:
    """The example's answer occurs in the answer.

    A policy can learn to name every candidate, so pair it with a reward of the format. Raises RewardError for an
    example without an answer.
    """

    def __init__(self, config: ContainsConfig) -> None:
        self._config = config

    def __call__(self, trajectories: Sequence[Trajectory]) -> list[float]:
        return [float(self._matches(trajectory)) for trajectory in trajectories]

    def _matches(self, trajectory: Trajectory) -> bool:
        expected = _normal(_expected(trajectory, "contains"), self._config.ignore_case).strip()
        if not expected:
            raise RewardError(f"reward 'contains': the answer of example {trajectory.name} is empty; any text holds it")
        pattern = re.escape(expected)
        if self._config.whole_word:
            # The points keep '7' out of '7.5' and '2.7', which no word boundary does.
            pattern = rf"(?<!\w)(?<![0-9][.,]){pattern}(?!\w|[.,][0-9])"
        answer = _normal(trajectory.answer, self._config.ignore_case)
        return _complete(trajectory, self._config.require_end) and re.search(pattern, answer) is not None


class Numeric:
    """The last number of the answer is the example's number, within `absolute` or `relative`, whichever is wider.

    Read are signs, decimals (1.5, .5), thousands (1,234.5), exponents (1e-3), per cent (50% is 0.5) and fractions
    (3/4). A hyphen after a digit or a letter is no sign: the last number of '5-3' is 3. Words such as 'nan' and 'inf',
    a division by zero and a number beyond float range are never right.

    Raises RewardError for an example whose answer does not hold exactly one number.
    """

    def __init__(self, config: NumericConfig) -> None:
        self._config = config

    def __call__(self, trajectories: Sequence[Trajectory]) -> list[float]:
        return [float(self._matches(trajectory)) for trajectory in trajectories]

    def _matches(self, trajectory: Trajectory) -> bool:
        expected = self._expected_number(trajectory)
        numbers = _numbers(trajectory.answer)
        if not numbers or not _complete(trajectory, self._config.require_end):
            return False
        tolerance = max(self._config.absolute, self._config.relative * abs(expected))
        return abs(numbers[-1] - expected) <= tolerance  # False for nan, which a number that cannot be told reads as

    def _expected_number(self, trajectory: Trajectory) -> float:
        text = _expected(trajectory, "numeric")
        numbers = _numbers(text)
        if len(numbers) != 1 or not math.isfinite(numbers[0]):
            raise RewardError(
                f"reward 'numeric': the answer {text!r} of example {trajectory.name} cannot be compared with; expected "
                "exactly one number in it"
            )
        return numbers[0]


_PLAIN = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])(?:\.[0-9]+)?|[0-9]+(?:\.[0-9]+)?|\.[0-9]+)(?:[eE][-+]?[0-9]+)?"

_NUMBER = re.compile(
    # No sign where a number or word comes before (5-3, item-3), no number inside a word (x2) or a version (1.2.3).
    r"(?P<sign>(?<![\w)\]])[-+])?(?<!\w)(?<![0-9]\.)"
    rf"(?P<number>{_PLAIN})(?: ?/ ?(?P<denominator>{_PLAIN}))?(?P<percent> ?%)?"
)


def _numbers(text: str) -> list[float]:
    """Every number of the text, in order; nan for a division by zero or a number beyond float range."""
    return [_value(match) for match in _NUMBER.finditer(text.replace("\N{MINUS SIGN}", "-"))]


def _value(match: re.Match[str]) -> float:
    value = _float(match["number"])
    if match["denominator"]:
        denominator = _float(match["denominator"])
        value = value / denominator if denominator else math.nan
    if match["percent"]:
        value /= 100
    if match["sign"] == "-":
        value = -value
    return value if math.isfinite(value) else math.nan


def _float(text: str) -> float:
    return float(text.replace(",", ""))


def _expected(trajectory: Trajectory, reward: str) -> str:
    if trajectory.example is None or trajectory.example.answer is None:
        raise RewardError(
            f"reward {reward!r}: {trajectory.name} has no answer to compare with; choose a reward that needs none, or "
            "a data set with answers"
        )
    return trajectory.example.answer


def _complete(trajectory: Trajectory, require_end: bool) -> bool:
    return trajectory.actions[-1].ended or not require_end


def _normal(text: str, ignore_case: bool) -> str:
    """One form of text that looks the same: 'é' may be one code point or two, and a file system may choose which."""
    text = unicodedata.normalize("NFC", text)
    return text.casefold() if ignore_case else text
