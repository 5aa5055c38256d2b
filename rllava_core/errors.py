"""The one family of errors a user meets: each message says what happened, where, and what would be right.

The command line prints the message alone and exits with `exit_code`: 2 for a wrong command, config or input, 1 for a
run that failed after it had begun.
"""

from __future__ import annotations

import traceback
from pathlib import Path


class RllavaError(Exception):
    """Base of every error that rllava raises for a user to read.

    everywhere: all processes of a run raise it, so that one of them is enough to say so.
    """

    exit_code = 1
    everywhere = False


class ConfigError(RllavaError):
    """A config, an override or a command that cannot be carried out as written."""

    exit_code = 2


class PluginError(RllavaError):
    """A plugin or component that was asked for is missing, broken, incompatible or ambiguous."""

    exit_code = 2


class DataError(RllavaError):
    """An example, an image or a data file that cannot be used."""

    exit_code = 2


class ModelError(RllavaError):
    """A model directory that cannot be loaded, or an input that the model cannot take."""

    exit_code = 2


class RewardError(RllavaError):
    """A reward function that raised, or returned something other than one finite number a trajectory."""


class InvariantError(RllavaError):
    """A batch that must not be trained on: tokens, images, positions or log-probs do not fit together."""


class TrainingError(RllavaError):
    """A run that cannot go on: a non-finite loss, a disk that is full, a checkpoint that cannot be read."""


def describe(error: BaseException) -> str:
    """What somebody else's code did, and where: `raised KeyError: 'x' (reward.py:12)`, `called sys.exit(3) (…)`."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    return what_happened(error) + place


def what_happened(error: BaseException) -> str:
    """`raised KeyError: …` or `called sys.exit(…)`, in one line that can be printed whatever the error holds."""
    if isinstance(error, SystemExit):
        return printable(f"called sys.exit({error.code!r})")
    try:
        said = str(error)
    except Exception:  # noqa: BLE001 - somebody else's __str__; that the error was raised is what counts
        said = "(its message cannot be shown)"
    return printable(f"raised {type(error).__name__}: {said}")


def printable(text: str) -> str:
    """One line of valid UTF-8 without control characters: half surrogate pairs and the like are escaped."""
    line = " ".join(text.split())
    escaped = "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in line)
    return escaped.encode("utf-8", "backslashreplace").decode()
