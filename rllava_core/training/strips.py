"""Episodes as pictures: a strip of frames, each with what the policy did there and what that brought."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import PIL.Image
import PIL.ImageDraw
import PIL.ImageFont

from rllava_core.errors import printable
from rllava_core.mdp.images import Image
from rllava_core.mdp.trajectory import Trajectory, Turn
from rllava_core.training.files import writing

FRAME, MARGIN, LINE, COLUMNS = 160, 8, 16, 8
"""Pixels of a frame's longer side, around it and of a line of text; frames in a row."""


def write_strips(directory: Path, trajectories: Sequence[Trajectory], successes: Sequence[bool]) -> list[Path]:
    """`directory/0001-NAME.png`, …: one an episode, in their order. Raises TrainingError if they cannot be written."""
    paths = []
    with writing(f"episodes in {directory}"):
        directory.mkdir(parents=True, exist_ok=True)
        for number, (trajectory, success) in enumerate(zip(trajectories, successes, strict=True), start=1):
            name = re.sub(r"[^A-Za-z0-9_.-]+", "-", Path(trajectory.name).name).strip("-.")[:60]
            path = directory / f"{number:04d}-{name}.png"
            draw_strip(trajectory, success).save(path)
            paths.append(path)
    return paths


def draw_strip(trajectory: Trajectory, success: bool) -> PIL.Image.Image:
    """A picture for each turn, its action and reward beneath, and at the end what the last action led to."""
    cells = [(turn.observation.images, _caption(number, turn)) for number, turn in enumerate(trajectory.turns, start=1)]
    ending = "terminated" if trajectory.truncation is None else f"truncated ({trajectory.truncation})"
    total = f"return {trajectory.episode_return:.4g}"
    cells.append((trajectory.outcome, [ending, total, "success" if success else "no success"]))
    columns = min(COLUMNS, len(cells))
    rows = -(-len(cells) // columns)
    width, height = FRAME + 2 * MARGIN, FRAME + 3 * LINE + 2 * MARGIN
    strip = PIL.Image.new("RGB", (columns * width, rows * height + LINE + MARGIN), "white")
    draw = PIL.ImageDraw.Draw(strip)
    font = PIL.ImageFont.load_default(12)
    draw.text((MARGIN, MARGIN // 2), _fitted(draw, trajectory.name, columns * width - 2 * MARGIN, font), "black", font)
    for place, (images, lines) in enumerate(cells):
        left = place % columns * width + MARGIN
        top = place // columns * height + LINE + MARGIN
        _paste(strip, images, left, top)
        for number, line in enumerate(lines):
            draw.text((left, top + FRAME + 2 + number * LINE), _fitted(draw, line, FRAME, font), "black", font)
    return strip


def _caption(number: int, turn: Turn) -> list[str]:
    action = turn.action.text if turn.parsed else f"{turn.action.text} (not understood)"
    return [f"{number}: {action}", f"reward {turn.reward:+.4g}"]


def _paste(strip: PIL.Image.Image, images: Sequence[Image], left: int, top: int) -> None:
    """The images of one observation side by side in the place of one frame; whole pixels stay whole."""
    for number, image in enumerate(images):
        room = FRAME // len(images)
        picture = image.to_pil()
        scale = min(room / picture.width, FRAME / picture.height)
        size = (max(1, int(picture.width * scale)), max(1, int(picture.height * scale)))
        method = PIL.Image.Resampling.NEAREST if scale > 1 else PIL.Image.Resampling.BOX
        strip.paste(picture.resize(size, method), (left + number * room, top))


def _fitted(
    draw: PIL.ImageDraw.ImageDraw, text: str, width: int, font: PIL.ImageFont.FreeTypeFont | PIL.ImageFont.ImageFont
) -> str:
    """The text on one line, cut where it is wider than `width` pixels."""
    line = printable(text)
    if draw.textlength(line, font) <= width:
        return line
    while line and draw.textlength(line + "…", font) > width:
        line = line[:-1]
    return line + "…"
