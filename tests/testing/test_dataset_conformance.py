"""Every check of a data set has a mutant that it catches, and healthy data sets pass all of them."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rllava_core.errors import DataError
from rllava_core.mdp.examples import Example
from rllava_core.mdp.images import Image, ImageFile
from rllava_core.testing import samples
from rllava_core.testing.conformance import Conformance, ConformanceError, Outcome, checks_of, run
from rllava_core.testing.datasets import DatasetConformance, check_dataset


class Healthy:
    """Nine examples of one picture each, the last three held out."""

    def __init__(self) -> None:
        self.all = [self.make(number) for number in range(9)]

    def make(self, number: int) -> Any:
        return Example(
            name=f"sample:{number}",
            fields={"question": "How many?", "number": number},
            images=(samples.picture(number),),
            answer=str(number % 3),
        )

    def examples(self, split: str) -> Any:
        return self.all[:6] if split == "train" else self.all[6:]


class HealthyChoices(Healthy):
    def make(self, number: int) -> Any:
        return replace(super().make(number), choices=("0", "1", "2"))


class HoldsNothingOut(Healthy):
    def examples(self, split: str) -> Any:
        if split == "held_out":
            raise DataError("nothing is held out; set held_out_fraction above 0")
        return tuple(self.all)


class HasNoPictures(Healthy):
    def make(self, number: int) -> Any:
        return replace(super().make(number), images=(), answer=None)


class HasNoExamples:
    pass


class Generates(Healthy):
    def examples(self, split: str) -> Any:
        return (example for example in super().examples(split))


class IsEmpty(Healthy):
    def examples(self, split: str) -> Any:
        return []


class CannotBeSliced(Healthy):
    def examples(self, split: str) -> Any:
        return dict(enumerate(super().examples(split)))


class ReturnsRecords(Healthy):
    def make(self, number: int) -> Any:
        return {"question": "How many?", "answer": str(number)}


class NamesNothing(Healthy):
    def make(self, number: int) -> Any:
        return replace(super().make(number), name="")


class NamesTheFile(Healthy):
    def make(self, number: int) -> Any:
        return replace(super().make(number), name="train.jsonl")


class HoldsNothingOutSilently(Healthy):
    def examples(self, split: str) -> Any:
        return self.all if split == "train" else []


class RefusesWithoutAReason(Healthy):
    def examples(self, split: str) -> Any:
        if split == "held_out":
            raise DataError
        return self.all


class HoldsOutTheWrongSlice(Healthy):
    def examples(self, split: str) -> Any:
        return self.all[:7] if split == "train" else self.all[6:]


class RepeatsItself(Healthy):
    def make(self, number: int) -> Any:
        return replace(super().make(number % 8), name=f"sample:{number}")


class ShufflesWhenAsked(Healthy):
    def examples(self, split: str) -> Any:
        examples = super().examples(split)
        return random.sample(examples, len(examples))


class SplitsWhenAsked(Healthy):
    """Whoever asks first gets the first examples."""

    parts: Any = None

    def examples(self, split: str) -> Any:
        if self.parts is None:
            other = "held_out" if split == "train" else "train"
            self.parts = {split: self.all[:6], other: self.all[6:]}
        return list(self.parts[split])


class ShufflesAtTheStart(Healthy):
    def __init__(self) -> None:
        super().__init__()
        random.shuffle(self.all)


class DrawsItsPictures(Healthy):
    def make(self, number: int) -> Any:
        pixels = np.random.default_rng().integers(0, 256, (8, 8), dtype=np.uint8)
        return replace(super().make(number), images=(Image.from_array(pixels),))


class GivesItsOwnList(Healthy):
    def __init__(self) -> None:
        super().__init__()
        self.train = self.all[:6]

    def examples(self, split: str) -> Any:
        return self.train if split == "train" else self.all[6:]


class NamesAMissingFile(Healthy):
    def make(self, number: int) -> Any:
        images = (ImageFile(Path("missing.png")),) if number == 5 else ()
        return replace(super().make(number), images=images)


class HoldsArrays(Healthy):
    def make(self, number: int) -> Any:
        return replace(super().make(number), images=(np.zeros((8, 8, 3), np.uint8),))


class HoldsOneImage(Healthy):
    def make(self, number: int) -> Any:
        return replace(super().make(number), images=samples.picture(number))


class HoldsFloats(Healthy):
    def make(self, number: int) -> Any:
        return replace(super().make(number), images=(Image(np.zeros((8, 8), np.float32)),))  # type: ignore[arg-type]


def with_field(name: Any, value: Any) -> Callable[[], Any]:
    class HasAnOddField(Healthy):
        def make(self, number: int) -> Any:
            return replace(super().make(number), fields={name: value})

    return HasAnOddField


class ListsItsFields(Healthy):
    def make(self, number: int) -> Any:
        return replace(super().make(number), fields=["How many?"])


class AnswersInNumbers(Healthy):
    def make(self, number: int) -> Any:
        return replace(super().make(number), answer=number)


class RepeatsAChoice(Healthy):
    def make(self, number: int) -> Any:
        return replace(super().make(number), choices=("0", "1", "2", "2"))


class JoinsItsChoices(Healthy):
    def make(self, number: int) -> Any:
        return replace(super().make(number), choices="012")


class LosesTheAnswer(Healthy):
    def make(self, number: int) -> Any:
        return replace(super().make(number), choices=("0", "1"))


MUTANTS: dict[str, list[tuple[Any, str]]] = {
    "it_can_be_constructed": [(HasNoExamples, "has no method 'examples'")],
    "the_examples_to_train_on_are_a_sequence": [
        (Generates, "expected a sequence such as a list"),
        (IsEmpty, "examples('train') is empty"),
        (CannotBeSliced, "cannot be read by number and by slice"),
    ],
    "every_entry_is_an_example_with_a_name": [
        (ReturnsRecords, "entry 0 of examples('train') is {'question'"),
        (NamesNothing, "has the name ''"),
    ],
    "names_are_unique_in_a_split": [(NamesTheFile, "not unique, such as train.jsonl")],
    "examples_are_held_out_or_refused_with_a_reason": [
        (HoldsNothingOutSilently, "examples('held_out') is empty"),
        (RefusesWithoutAReason, "a DataError without a message"),
    ],
    "no_name_is_on_both_sides_of_the_split": [(HoldsOutTheWrongSlice, "1 of 3 held-out examples")],
    "no_content_is_on_both_sides_of_the_split": [(RepeatsItself, "such as sample:8 and sample:0; keep equal ones")],
    "the_order_is_the_same_when_asked_again": [(ShufflesWhenAsked, "and when asked again sample:")],
    "a_new_object_has_the_same_examples_in_the_same_order": [
        (ShufflesAtTheStart, "and in a second object sample:"),
        (SplitsWhenAsked, "examples('train') has 6 entries, and in a second object 3"),
        (DrawsItsPictures, "is sample:0, and in a second object sample:0 with other content"),
    ],
    "changing_the_returned_list_changes_nothing": [(GivesItsOwnList, "a caller that changes the list")],
    "every_image_can_be_loaded": [
        (NamesAMissingFile, "an image of sample:5 cannot be loaded: DataError: image missing.png: no such file"),
        (HoldsArrays, "expected an Image, which Image.from_array"),
        (HoldsOneImage, "expected a tuple of Image"),
        (HoldsFloats, "has pixels of float32 (8, 8)"),
    ],
    "fields_fit_into_a_prompt": [
        (with_field("question", None), "the field 'question' is None"),
        (with_field("question", b"How many?"), "is b'How many?'"),
        (with_field("picture", object()), "which a prompt would spell out like that"),
        (with_field("question", "\ud83d"), "half of a surrogate pair"),
        (with_field(0, "How many?"), "the field 0 has a name that no prompt can write"),
        (with_field("a{b}", "How many?"), "the field 'a{b}' has a name that no prompt can write"),
        (ListsItsFields, "has fields=['How many?']; expected a mapping"),
    ],
    "answers_are_text": [(AnswersInNumbers, "the answer is 0, not a str")],
    "choices_are_two_or_more_different_texts": [
        (RepeatsAChoice, "the choices are ('0', '1', '2', '2')"),
        (JoinsItsChoices, "the choices are '012'; expected a tuple"),
    ],
    "the_answer_is_among_the_choices": [(LosesTheAnswer, "sample:2: the answer '2' is none of the choices")],
}

# Needs an installed data set, so its mutant is a test of its own, below.
INSTALLED = "a_new_process_has_the_same_examples_in_the_same_order"


def outcomes(create: Any, **attributes: Any) -> dict[str, Outcome]:
    suite = type("Suite", (DatasetConformance,), {"create": lambda self: create(), **attributes})()
    return {outcome.check: outcome for outcome in run(suite)}


def test_every_check_has_a_mutant() -> None:
    own = set(checks_of(DatasetConformance)) - set(checks_of(Conformance))

    assert {f"test_{check}" for check in [*MUTANTS, INSTALLED]} == own


@pytest.mark.parametrize(
    ("check", "mutant", "message"),
    [(check, *pair) for check, pairs in MUTANTS.items() for pair in pairs],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_mutant_is_caught_by_its_check(check: str, mutant: Any, message: str) -> None:
    outcome = outcomes(mutant)[check]

    assert outcome.status == "failed"
    assert message in outcome.message


@pytest.mark.parametrize("dataset", [Healthy, HealthyChoices, HoldsNothingOut, HasNoPictures])
def test_a_healthy_data_set_passes_every_check(dataset: Any) -> None:
    found = outcomes(dataset)

    assert not {check: found[check] for check in MUTANTS if found[check].status != "passed"}
    assert found[INSTALLED].status == "skipped"


INSTALLED_SOURCE = """
from rllava_core import ComponentSpec, hookimpl
from rllava_core.config import Options
from rllava_core.mdp.examples import Example

class Config(Options):
    last: str = "y"

class Words:
    def __init__(self, config):
        words = {word * 3 for word in "abcdefghijklmnopqrstuvwx" + config.last}
        self.all = [Example(word, {"question": word}) for word in sorted(words)]

    def examples(self, split):
        return self.all[3:] if split == "train" else self.all[:3]

@hookimpl
def rllava_datasets():
    return [ComponentSpec(name="words", target="rllava_words:Words", config="rllava_words:Config", summary="Words.")]
"""


@pytest.mark.parametrize("mutant", [False, True])
def test_a_new_process_would_see_another_order_of_a_set(fake_distribution: Any, mutant: bool) -> None:
    source = INSTALLED_SOURCE.replace("sorted(words)", "words") if mutant else INSTALLED_SOURCE
    fake_distribution("rllava-words", "1.0", source)

    suite = type("Suite", (DatasetConformance,), {"component": "words", "options": {"last": "z"}})()
    found = {outcome.check: outcome for outcome in run(suite)}

    assert found[INSTALLED].status == ("failed" if mutant else "passed")
    assert ("sort what comes from a set" in found[INSTALLED].message) == mutant
    assert found["a_new_object_has_the_same_examples_in_the_same_order"].status == "passed"


def test_data_may_be_declared_to_repeat_themselves() -> None:
    check = "no_content_is_on_both_sides_of_the_split"

    assert outcomes(RepeatsItself, allowed_leaks=1)[check].status == "passed"


def test_equal_files_on_both_sides_are_found(tmp_path: Path) -> None:
    class HoldsFiles(Healthy):
        def make(self, number: int) -> Any:
            path = tmp_path / f"{number}.png"
            samples.picture(number % 7).to_pil().save(path)
            return Example(f"sample:{number}", {"question": "?"}, (ImageFile(path),), "yes")

    outcome = outcomes(HoldsFiles)["no_content_is_on_both_sides_of_the_split"]

    assert "2 held-out examples equal one to train on" in outcome.message
    assert "such as sample:7 and sample:0, sample:8 and sample:1;" in outcome.message


def test_no_more_images_are_decoded_than_the_limit() -> None:
    loaded = []

    class Counts:
        def __init__(self, number: int) -> None:
            self.number = number

        def load(self) -> Image:
            loaded.append(self.number)
            return samples.picture(self.number)

    class CountsImages(Healthy):
        def make(self, number: int) -> Any:
            return replace(super().make(number), images=(Counts(number),))

    suite = type("Suite", (DatasetConformance,), {"create": lambda self: CountsImages(), "limit": 3})()
    suite.test_every_image_can_be_loaded()

    assert loaded == [0, 4, 8]


def test_check_dataset_needs_no_plugin() -> None:
    check_dataset(Healthy)


def test_check_dataset_lists_everything_that_is_wrong() -> None:
    with pytest.raises(ConformanceError) as caught:
        check_dataset(IsEmpty)

    lines = str(caught.value).splitlines()
    assert [line.partition(":")[0] for line in lines] == [
        "the examples to train on are a sequence",
        "examples are held out or refused with a reason",
    ]
