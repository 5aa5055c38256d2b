"""The readable sample of trajectories."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from rllava_core.errors import TrainingError
from rllava_core.mdp.examples import Example
from rllava_core.mdp.images import Image
from rllava_core.mdp.messages import Message
from rllava_core.mdp.trajectory import ActionSegment, ContextSegment, Segment, Trajectory, conversation
from rllava_core.training.samples import write_sample

PICTURES = tuple(Image.from_array(np.full((4, 6, 3), shade, np.uint8)) for shade in (0, 100, 200))


def trajectory(answer: str = "7", group: int = 0, right: str | None = "7", ended: bool = True) -> Trajectory:
    prompt = ContextSegment((1, 2), PICTURES[:2], (Message.user(*PICTURES[:2], "Which digit?\nOne word."),))
    action = ActionSegment((5, 6), np.array([-0.25, -0.5], np.float32), answer, ended)
    return Trajectory(
        example=Example(f"train.jsonl:{group}", {}, PICTURES[:2], right),
        seed=0,
        group=group,
        turns=conversation([prompt, action]),
        terminated=True,
        scores={"exact_match": float(answer == right), "format": 0.5},
        score=1.25,
    )


def written(folder: Path, *trajectories: Trajectory) -> str:
    return write_sample(folder, 7, trajectories).read_text(encoding="utf-8")


def test_a_group_is_a_table_under_its_prompt_and_images(tmp_path: Path) -> None:
    text = written(tmp_path, trajectory(), trajectory("8", ended=False))
    first, second = (f"images/{picture.digest[:16]}.png" for picture in PICTURES[:2])

    assert (
        text
        == f"""\
# Trajectories of step 7

## train.jsonl:0

![image]({first})

![image]({second})

    user: [image][image]Which digit?
    One word.

Right answer: `7`

| answer | log-prob | ended | exact_match | format | return |
|---|---|---|---|---|---|
| `7` | -0.750 | yes | 1 | 0.5 | 1.25 |
| `8` | -0.750 | cut | 0 | 0.5 | 1.25 |
"""
    )
    assert (tmp_path / "step-000007.md").is_file()


def test_the_images_are_the_ones_shown(tmp_path: Path) -> None:
    written(tmp_path, trajectory())

    files = sorted((tmp_path / "images").iterdir())
    assert {path.name for path in files} == {f"{picture.digest[:16]}.png" for picture in PICTURES[:2]}
    for picture in PICTURES[:2]:
        saved = np.asarray(PIL.Image.open(tmp_path / "images" / f"{picture.digest[:16]}.png"))
        assert np.array_equal(saved, picture.pixels)


def test_an_image_that_is_there_is_not_written_again(tmp_path: Path) -> None:
    written(tmp_path, trajectory())
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "images").iterdir()}

    written(tmp_path, trajectory())

    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "images").iterdir()} == times


def test_the_first_groups_are_enough(tmp_path: Path) -> None:
    text = written(tmp_path, *(trajectory(group=group) for group in range(6)))

    assert [line for line in text.splitlines() if line.startswith("## ")] == [
        f"## train.jsonl:{group}" for group in range(4)
    ]


@pytest.mark.parametrize(
    ("answer", "shown"),
    [
        ("", "(nothing)"),
        ("a\nb\tc", r"`a\nb\tc`"),
        ("a|b", r"`a\|b`"),
        ("`code`", "`'code'`"),
        ("\\frac", r"`\\frac`"),
        ("七 é ñ", "`七 é ñ`"),
        ("\x00\x1b[31m\u202e\u2028", r"`\x00\x1b[31m\u202e\u2028`"),
        ("\ud83d", r"`\ud83d`"),
        ("\ufffd", "`\ufffd`"),
    ],
)
def test_odd_characters_cannot_break_the_table(tmp_path: Path, answer: str, shown: str) -> None:
    text = written(tmp_path, trajectory(answer, right=answer or None))

    assert f"\n| {shown} | -0.750 | yes | " in text
    if answer:
        assert f"\nRight answer: {shown}\n" in text


def test_half_a_surrogate_pair_in_a_prompt_can_be_written(tmp_path: Path) -> None:
    item = trajectory()
    odd = replace(item, turns=conversation([ContextSegment((1,), (), (Message.user("\udc80"),)), *item.actions]))

    assert "    user: \\udc80" in written(tmp_path, odd)


def test_an_episode_without_an_example_is_named_by_its_seed(tmp_path: Path) -> None:
    text = written(tmp_path, replace(trajectory(), example=None, seed=42))

    assert "## episode with seed 42" in text
    assert "Right answer" not in text


def test_turns_stand_side_by_side(tmp_path: Path) -> None:
    item = trajectory("first")
    segments: list[Segment] = [item.prompt, *item.actions, ContextSegment((3,)), *trajectory("second").actions]
    turns = replace(item, turns=conversation(segments))

    assert "| `first` / `second` | -1.500 |" in written(tmp_path, turns)


def test_the_longest_episode_of_a_group_is_told_turn_by_turn(tmp_path: Path) -> None:
    item = trajectory("first")
    [first] = item.turns
    segments: list[Segment] = [
        item.prompt,
        first.action,
        ContextSegment((3,), PICTURES[2:], (Message.user(*PICTURES[2:], "And now?"),)),
    ]
    turns = conversation([*segments, *trajectory("second").actions], [-0.5, 2.0])
    longest = replace(
        item, turns=(replace(turns[0], parsed=False), turns[1]), outcome=PICTURES[:1], score=0.0, terminated=False
    )
    left = replace(longest, truncation="turns")

    text = written(tmp_path, trajectory(), left)

    first_name, _, third = (f"images/{picture.digest[:16]}.png" for picture in PICTURES)
    assert "| `first` / `second` | -1.500 | truncated (turns) |" in text
    told = text.partition("The longest of these, turn by turn (2 turns):")[2]
    assert [line for line in told.splitlines() if line] == [
        "Turn 1: `first`, which the environment could not read, reward -0.5",
        f"![image]({third})",
        "    user: [image]And now?",
        "Turn 2: `second`, reward 2",
        f"![image]({first_name})",
    ]
    assert "turn by turn" not in written(tmp_path / "other", trajectory())


def test_a_full_disk_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "images").write_text("in the way", encoding="utf-8")

    with pytest.raises(TrainingError, match=r"trajectory sample in .* could not be written"):
        written(tmp_path, trajectory())
