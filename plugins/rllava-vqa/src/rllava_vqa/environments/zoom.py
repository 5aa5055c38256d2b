"""Look again by choice: the policy picks a region by its name, or one of the answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rllava_core.config import TaskSection
from rllava_core.errors import ConfigError, DataError
from rllava_core.mdp.examples import Example
from rllava_core.mdp.messages import Action, Transition
from rllava_vqa.boxes import Box, BoxError, grid_boxes, read_box, shown
from rllava_vqa.config import ZoomConfig
from rllava_vqa.environments.look_again import LookAgain


class Zoom(LookAgain):
    """Choices are the names of the regions and the possible answers; without zooms left, the answers alone.

    The regions are the example's field `boxes`, a list of [x0, y0, x1, y1] in pixels of the whole image, where it has
    one; else the cells of a grid, row by row. Boxes may be given in fractions of a pixel, and are widened to whole
    ones. `{regions}` in a prompt lists them.
    """

    component = "zoom"

    def __init__(self, config: ZoomConfig, task: TaskSection) -> None:
        """Raises ConfigError if an answer of the task is the name of a region, too."""
        super().__init__(config, task)
        self._config = config
        self._regions: dict[str, Box] = {}
        self._answers: tuple[str, ...] = ()
        columns, rows = config.grid
        names = self._names(columns * rows) if isinstance(config.zoom_names, str) else config.zoom_names
        if shared := _shared(names, task.choices or ()):
            raise ConfigError(
                f"task.choices has the answer {shared!r}, which is the name of a region, too; rename the regions with "
                "task.environment.zoom_names"
            )

    def step(self, action: Action) -> Transition:
        """Show a region, or judge an answer. Raises ValueError for what is not among the choices."""
        if action.text not in self._choices():
            raise ValueError(f"{action.text!r} is not among the choices {self._choices()}")
        box = self._regions.get(action.text)
        return self._judge(action.text) if box is None else self._zoom(box)

    def _begin(self, example: Example) -> Mapping[str, Any]:
        """Name the regions.

        Raises DataError that names the example for a box that is none or not inside the image, for more regions than
        names, and for answers that cannot be chosen or told from regions.
        """
        boxes = self._boxes(example)
        names = self._names(len(boxes))
        if len(names) < len(boxes):
            raise DataError(
                f"{example.name}: {len(boxes)} regions, but task.environment.zoom_names has {len(names)} names"
            )
        self._regions = dict(zip(names, boxes, strict=True))
        self._answers = self._answers_of(example)
        listed = "; ".join(f"{name}: {' '.join(map(str, box))}" for name, box in self._regions.items())
        return {"regions": listed}

    def _choices(self) -> tuple[str, ...]:
        return (*self._regions, *self._answers) if self._may_zoom else self._answers

    def _boxes(self, example: Example) -> list[Box]:
        boxes = example.fields.get("boxes")
        if boxes is None:
            try:
                return list(grid_boxes(self._size, *self._config.grid))
            except BoxError as error:
                raise DataError(f"{example.name}: {error} (task.environment.grid)") from None
        if not isinstance(boxes, list | tuple) or not boxes:
            raise DataError(f"{example.name}: the field boxes is {shown(boxes)}, expected a list of [x0, y0, x1, y1]")
        regions = []
        for index, box in enumerate(boxes):
            try:
                regions.append(read_box(box, self._size))
            except BoxError as error:
                raise DataError(f"{example.name}: boxes[{index}] is {error}") from None
        return regions

    def _names(self, count: int) -> tuple[str, ...]:
        """The names of so many regions; fewer, where the config lists fewer."""
        names = self._config.zoom_names
        if isinstance(names, str):
            return tuple(names.replace("{number}", str(number)) for number in range(1, count + 1))
        return names[:count]

    def _answers_of(self, example: Example) -> tuple[str, ...]:
        answers = self._task.choices if example.choices is None else example.choices
        if answers is None:
            raise DataError(
                f"{example.name}: environment 'zoom' needs the possible answers; set task.choices, let the data set "
                "give choices, or take the environment zoom_text"
            )
        if self._right not in answers:
            raise DataError(
                f"{example.name}: the answer {self._right!r} is not among the choices {list(answers)}, so it can never "
                "be given"
            )
        if shared := _shared(tuple(self._regions), answers):
            raise DataError(
                f"{example.name}: the answer {shared!r} is the name of a region, too; rename the regions with "
                "task.environment.zoom_names"
            )
        return answers


def _shared(names: Sequence[str], answers: Sequence[str]) -> str | None:
    return next((name for name in names if name in answers), None)
