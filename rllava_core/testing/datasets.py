"""What every data set must keep to: the same examples in the same order, whole, and none on both sides of the split."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, MutableSequence, Sequence
from typing import Any, ClassVar
from unittest import SkipTest

import numpy as np

from rllava_core.errors import DataError
from rllava_core.mdp.examples import Dataset, Example, Split
from rllava_core.mdp.images import Image, ImageFile
from rllava_core.specs import Kind
from rllava_core.testing.conformance import (
    Conformance,
    ConformanceError,
    raise_failures,
    require,
    run,
)
from rllava_core.testing.processes import in_another_process
from rllava_core.testing.values import choices_problem, content, digest, image_problem, shortened, text_problem

SPLITS: tuple[Split, ...] = ("train", "held_out")


class DatasetConformance(Conformance):
    """The checks of a data set. For one that reads files, `options` name small ones that the tests bring.

    limit: how many images are decoded, spread over the data.
    allowed_leaks: how many held-out examples may equal one to train on, for data whose entries repeat by nature.
    """

    kind: ClassVar[Kind] = "dataset"
    limit: int = 200
    allowed_leaks: int = 0

    def test_it_can_be_constructed(self) -> None:
        dataset = self.create()
        require(callable(getattr(dataset, "examples", None)), f"{shortened(dataset)} has no method 'examples'")

    def test_the_examples_to_train_on_are_a_sequence(self) -> None:
        examples = self.create().examples("train")
        if not hasattr(examples, "__len__") or not hasattr(examples, "__getitem__"):
            raise ConformanceError(
                f"examples('train') returned {shortened(examples)}; expected a sequence such as a list: the core asks "
                "for its length and for entries by number"
            )
        require(len(examples) > 0, "examples('train') is empty; raise a DataError that says what is missing")
        try:
            part = [example.name for example in examples[: len(examples) // 2 + 1]]
            first = [examples[number].name for number in range(len(part))]
        except TypeError as error:
            raise ConformanceError(f"examples('train') cannot be read by number and by slice: {error}") from error
        require(part == first, "a slice of examples('train') holds other examples than the numbers that it spans")

    def test_every_entry_is_an_example_with_a_name(self) -> None:
        for example in self._all():
            require(
                isinstance(example.name, str) and example.name.strip(),
                f"an example has the name {example.name!r}; expected where it came from, such as 'train.jsonl:12'",
            )

    def test_names_are_unique_in_a_split(self) -> None:
        dataset = self.create()
        for split in SPLITS:
            counts = Counter(example.name for example in _examples(dataset, split))
            repeated = [name for name, count in counts.items() if count > 1]
            require(
                not repeated,
                f"{len(repeated)} names of examples('{split}') are not unique, such as {', '.join(repeated[:3])}; "
                "messages could not say which example they mean",
            )

    def test_examples_are_held_out_or_refused_with_a_reason(self) -> None:
        dataset = self.create()
        try:
            examples = dataset.examples("held_out")
        except DataError as error:
            require(str(error).strip(), "examples('held_out') raised a DataError without a message")
            return
        require(
            len(examples) > 0,
            "examples('held_out') is empty, so nothing could be evaluated; hold some out, or raise a DataError that "
            "says how to",
        )

    def test_no_name_is_on_both_sides_of_the_split(self) -> None:
        dataset = self.create()
        train, held_out = ({example.name for example in _examples(dataset, split)} for split in SPLITS)
        both = sorted(train & held_out)
        require(
            not both,
            f"{len(both)} of {len(held_out)} held-out examples are also to be trained on, such as "
            f"{', '.join(both[:3])}; evaluation would measure what was learnt by heart",
        )

    def test_no_content_is_on_both_sides_of_the_split(self) -> None:
        dataset = self.create()
        leaks = _leaks(_examples(dataset, "train"), _examples(dataset, "held_out"))
        pairs = ", ".join(f"{held_out} and {train}" for held_out, train in leaks[:3])
        require(
            len(leaks) <= self.allowed_leaks,
            f"{len(leaks)} held-out examples equal one to train on in fields, images and answer, such as {pairs}; keep "
            f"equal ones on one side, or set allowed_leaks = {len(leaks)} if the data repeat by nature",
        )

    def test_the_order_is_the_same_when_asked_again(self) -> None:
        dataset = self.create()
        first = {split: _contents(dataset, split) for split in SPLITS}
        for split in reversed(SPLITS):
            _require_same(first[split], _contents(dataset, split), split, "when asked again")

    def test_a_new_object_has_the_same_examples_in_the_same_order(self) -> None:
        one, other = self.create(), self.create()
        # The second one is asked in another order, for what is held out must not depend on who asks first.
        second = {split: _contents(other, split) for split in reversed(SPLITS)}
        for split in SPLITS:
            _require_same(_contents(one, split), second[split], split, "in a second object")

    def test_a_new_process_has_the_same_examples_in_the_same_order(self) -> None:
        self.find()
        if type(self).create is not DatasetConformance.create:
            raise SkipTest("create is overridden, which another process does not know")
        given = (self.component, self.config().model_dump(mode="json"))
        require(
            in_another_process(__name__, "order_of", *given) == _order(self.create()),
            "another process has other examples, or another order; sort what comes from a set or a folder, and draw "
            "from a generator of its own with a fixed seed: a resumed run would go on with other examples",
        )

    def test_changing_the_returned_list_changes_nothing(self) -> None:
        dataset = self.create()
        for split in SPLITS:
            before = [example.name for example in _examples(dataset, split)]
            if not before or not isinstance(examples := dataset.examples(split), MutableSequence):
                continue
            examples.reverse()
            examples.pop()
            after = [example.name for example in _examples(dataset, split)]
            require(
                before == after,
                f"a caller that changes the list from examples('{split}') changes what the next call returns; return a "
                "tuple, or a new list",
            )

    def test_every_image_can_be_loaded(self) -> None:
        examples = list(self._all())
        for example in examples:
            if not isinstance(example.images, tuple):
                raise ConformanceError(
                    f"{example.name} has images={shortened(example.images)}; expected a tuple of Image or ImageFile"
                )
        for example in _spread([example for example in examples if example.images], self.limit):
            for source in example.images:
                _load(example, source)

    def test_fields_fit_into_a_prompt(self) -> None:
        for example in self._all():
            fields = example.fields
            if not isinstance(fields, Mapping):
                raise ConformanceError(
                    f"{example.name} has fields={shortened(fields)}; expected a mapping of name and value"
                )
            for name, value in fields.items():
                problem = _field_problem(name, value)
                require(problem is None, f"{example.name}: the field {name!r} {problem}")

    def test_answers_are_text(self) -> None:
        for example in self._all():
            problem = None if example.answer is None else text_problem(example.answer)
            require(problem is None, f"{example.name}: the answer {problem}; expected a str, or None if there is none")

    def test_choices_are_two_or_more_different_texts(self) -> None:
        for example in self._all():
            problem = None if example.choices is None else choices_problem(example.choices)
            require(problem is None, f"{example.name}: the choices {problem}")

    def test_the_answer_is_among_the_choices(self) -> None:
        for example in self._all():
            require(
                example.choices is None or example.answer is None or example.answer in example.choices,
                f"{example.name}: the answer {example.answer!r} is none of the choices {shortened(example.choices)}, "
                "so it could never be given",
            )

    def _all(self) -> Iterator[Example]:
        dataset = self.create()
        for split in SPLITS:
            yield from _examples(dataset, split)


def check_dataset(create: Callable[[], Dataset]) -> None:
    """Check the data sets that `create()` makes, installed or not. Raises ConformanceError that lists what is wrong."""

    class Unregistered(DatasetConformance):
        def create(self) -> Dataset:
            return create()

    raise_failures(run(Unregistered()))


def order_of(component: str, options: Mapping[str, Any]) -> str:
    """Digest of the names and answers of an installed data set, in order; another process calls this."""
    suite = DatasetConformance()
    suite.component, suite.options = component, options
    return _order(suite.create())


def _order(dataset: Dataset) -> str:
    """A hash of all but the pictures, which would all have to be decoded."""
    return digest(
        [
            [(example.name, example.answer, example.choices, example.fields) for example in _examples(dataset, split)]
            for split in SPLITS
        ]
    )


def _examples(dataset: Dataset, split: Split) -> list[Example]:
    """The examples of a split; none where the data set refuses to hold some out."""
    try:
        found = dataset.examples(split)
    except DataError:
        if split == "train":
            raise
        return []
    entries = list(found)
    for number, entry in enumerate(entries):
        if not isinstance(entry, Example):
            raise ConformanceError(
                f"entry {number} of examples('{split}') is {shortened(entry)}; expected an Example of rllava_core.mdp"
            )
    return entries


def _contents(dataset: Dataset, split: Split) -> list[tuple[str, Any]]:
    return [(example.name, content(example)) for example in _examples(dataset, split)]


def _require_same(first: list[tuple[str, Any]], second: list[tuple[str, Any]], split: Split, when: str) -> None:
    hint = "the examples must always be the same and in the same order, or no run could be repeated or resumed"
    require(
        len(first) == len(second),
        f"examples('{split}') has {len(first)} entries, and {when} {len(second)}; {hint}",
    )
    for number, (one, other) in enumerate(zip(first, second, strict=True)):
        what = one[0] if one[0] != other[0] else f"{one[0]} with other content"
        require(one == other, f"entry {number} of examples('{split}') is {one[0]}, and {when} {what}; {hint}")


def _leaks(train: Sequence[Example], held_out: Sequence[Example]) -> list[tuple[str, str]]:
    """Names of held-out examples and of those to train on that equal them, images compared by their pixels."""
    alike: dict[Any, list[Example]] = {}
    for example in train:
        alike.setdefault(_outline(example), []).append(example)
    leaks = []
    for example in held_out:
        for other in alike.get(_outline(example), []):
            if all(one.load() == two.load() for one, two in zip(example.images, other.images, strict=True)):
                leaks.append((example.name, other.name))
                break
    return leaks


def _outline(example: Example) -> Any:
    """What equal examples have in common, told without decoding an image."""
    sizes = (
        source.digest
        if isinstance(source, Image)
        else source.path.stat().st_size
        if isinstance(source, ImageFile)
        else 0
        for source in example.images
    )
    return content((example.fields, example.answer, example.choices, tuple(sizes)))


def _spread(examples: Sequence[Example], limit: int) -> list[Example]:
    """At most so many of the examples, from the first to the last."""
    places = np.linspace(0, len(examples) - 1, min(limit, len(examples))).astype(int)
    return [examples[place] for place in places.tolist()]


def _load(example: Example, source: Any) -> None:
    if not callable(getattr(source, "load", None)):
        raise ConformanceError(
            f"{example.name} has an image {shortened(source)}; expected an Image, which Image.from_array and "
            "Image.from_pil make, or an ImageFile"
        )
    try:
        image = source.load()
    except Exception as error:
        raise ConformanceError(
            f"an image of {example.name} cannot be loaded: {type(error).__name__}: {error}; check files when the data "
            "set is constructed, so that a run does not stop in the middle"
        ) from error
    problem = image_problem(image)
    require(problem is None, f"an image of {example.name} {problem}")


def _field_problem(name: Any, value: Any) -> str | None:
    """Why a prompt could not name the field; None if it can."""
    if not isinstance(name, str) or not name or set(name) & set("{}"):
        return "has a name that no prompt can write; expected a text without braces"
    if value is None:
        return "is None, which a prompt would spell out; leave it out, and a prompt that names it is refused"
    if isinstance(value, bytes) or (not isinstance(value, str) and " at 0x" in str(value)):
        return f"is {shortened(value)}, which a prompt would spell out like that; expected text or a number"
    return text_problem(str(value))
