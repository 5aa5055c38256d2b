"""What both forms of looking again share: the overview, the crops, the costs and the end of an episode."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping
from typing import Any, ClassVar

from rllava_core.config import TaskSection
from rllava_core.errors import DataError
from rllava_core.mdp.examples import Example
from rllava_core.mdp.images import Image
from rllava_core.mdp.messages import Message, Observation, TextPart, Transition
from rllava_core.mdp.single_turn import fill
from rllava_vqa.boxes import Box
from rllava_vqa.config import LookAgainConfig
from rllava_vqa.environments.views import crop_of, overview_of


class LookAgain:
    """An overview in which the answer cannot be read; regions to look at closely; one answer, which ends the episode.

    The environment judges the answer itself: the reward is 1 if it equals the example's answer, white space around it
    aside, else 0, and `info["success"]` says so. Every zoom costs `turn_cost`. After `zoom_limit` turns without an
    answer, only an answer is left, so an episode has at most `zoom_limit` + 1 turns.

    The first observation is the task's prompt with the overview as its image. Where the policy sees the whole
    conversation, a crop comes alone; where `task.history` is a number, it comes in the task's prompt, so that the
    question is always in sight. `crop_prompt` replaces either.
    """

    component: ClassVar[str]

    def __init__(self, config: LookAgainConfig, task: TaskSection) -> None:
        self._look = config
        self._task = task
        self._crop_prompt = "" if task.history == "all" else task.prompt
        if config.crop_prompt is not None:
            self._crop_prompt = config.crop_prompt
        self._name, self._right = "", ""
        self._fields: Mapping[str, Any] = {}
        self._image: Image | None = None
        self._turns = self._zooms = 0

    def reset(self, *, seed: int, example: Example | None) -> Observation:
        """The overview and the question. The example alone decides, the seed has no say.

        Raises DataError that names the example if it has no answer or not exactly one image.
        """
        if example is None:
            raise DataError(f"environment {self.component!r} needs examples: set task.dataset")
        where = f"{example.name}: environment {self.component!r}"
        if len(example.images) != 1:
            raise DataError(f"{where} shows parts of one image, the example has {len(example.images)}")
        if example.answer is None:
            raise DataError(f"{where} judges answers, the example has none to compare with")
        self._name, self._right = example.name, example.answer
        self._image = example.images[0].load()
        self._turns = self._zooms = 0
        width, height = self._size
        self._fields = {"width": width, "height": height, **self._begin(example), **example.fields}
        return self._overview(self._notice())

    def _begin(self, example: Example) -> Mapping[str, Any]:
        """Make what a form needs of a new example; what it returns, prompts may name beside the example's fields."""
        return {}

    def _choices(self) -> tuple[str, ...] | None:
        """What may be done in this turn; None for free text."""
        return None

    def _notice(self) -> str:
        """What must be said with the next picture."""
        return ""

    @property
    def _size(self) -> tuple[int, int]:
        """(width, height) of the whole image in pixels."""
        return self._whole.size

    @property
    def _whole(self) -> Image:
        if self._image is None:
            raise RuntimeError("step was called before reset")
        return self._image

    @property
    def _may_zoom(self) -> bool:
        return self._turns < self._look.zoom_limit

    def _zoom(self, box: Box) -> Transition:
        """Show a region."""
        self._turns += 1
        self._zooms += 1
        observation = self._show(self._crop_prompt, crop_of(self._whole, box, self._look.view_size), self._notice())
        info = {"success": False, "zooms": self._zooms, "box": list(box)}
        return Transition(-self._look.turn_cost, observation, terminated=False, info=info)

    def _judge(self, answer: str) -> Transition:
        """Compare with the right answer, and end the episode."""
        right = _normal(answer) == _normal(self._right)
        info = {"success": right, "zooms": self._zooms}
        return Transition(float(right), observation=None, terminated=True, info=info)

    def _overview(self, notice: str) -> Observation:
        picture = overview_of(self._whole, self._look.overview_size, self._look.view_size)
        return self._show(self._task.prompt, picture, notice)

    def _show(self, prompt: str, picture: Image, notice: str) -> Observation:
        parts = fill(prompt, self._fields, [picture], where=self._name)
        notices = (TextPart(notice),) if notice else ()
        return Observation((Message("user", (*parts, *notices)),), self._choices())


def _normal(answer: str) -> str:
    """As the reward `exact_match` reads answers by default."""
    return unicodedata.normalize("NFC", answer).strip()
