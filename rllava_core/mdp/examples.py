"""Examples and the data sets that read them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from rllava_core.mdp.images import ImageSource

Split = Literal["train", "held_out"]


@dataclass(frozen=True)
class Example:
    """One entry of a data set.

    name: where it came from (`train.jsonl:12`), unique in its data set, for messages.
    fields: values that the task's prompt may name, such as `question`.
    images: pictures or files, in the order in which the prompt shows them.
    answer: what is right, for rewards; None where there is no single answer.
    choices: the possible answers of this example, where they differ from example to example.
    """

    name: str
    fields: Mapping[str, Any] = field(default_factory=dict)
    images: tuple[ImageSource, ...] = ()
    answer: str | None = None
    choices: tuple[str, ...] | None = None


class Dataset(Protocol):
    """A reader of examples. The target of a `dataset` component, called with its config.

    Construction reads and checks everything that can be checked before a run; it raises DataError that names file and
    line.
    """

    def examples(self, split: Split) -> Sequence[Example]:
        """The examples to train on, or those held out, always the same and in the same order."""
        ...
