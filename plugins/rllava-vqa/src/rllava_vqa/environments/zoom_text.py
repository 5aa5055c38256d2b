"""Look again in free text: the policy writes which pixels it wants to see, or its answer."""

from __future__ import annotations

import re

from rllava_core.config import TaskSection
from rllava_core.mdp.messages import Action, Message, Observation, Transition
from rllava_vqa.boxes import BoxError, read_box
from rllava_vqa.config import ZoomTextConfig
from rllava_vqa.environments.look_again import LookAgain

_NUMBER = r"[-+]?[0-9]+(?:\.[0-9]+)?"
# `(?:\s*:)?\s*` and not `\s*:?\s*`, which takes quadratic time to refuse a row of blanks.
_ZOOM = re.compile(rf"zoom(?:\s*:)?\s*({_NUMBER})[\s,]+({_NUMBER})[\s,]+({_NUMBER})[\s,]+({_NUMBER})", re.IGNORECASE)
_ANSWER = re.compile(r"answer(?:\s*:|\s)\s*(\S.*)", re.IGNORECASE | re.DOTALL)


class ZoomText(LookAgain):
    """Actions are `zoom x0 y0 x1 y1`, in pixels of the whole image, and `answer TEXT`, and nothing else is read.

    Capitals, a colon behind the first word, commas between the numbers and white space around it all make no
    difference; fractions of a pixel are rounded outwards. `{width}` and `{height}` in a prompt are the image's.

    Everything else is refused: another text, one that was cut at the token limit, a region that is not wholly inside
    the image, a zoom when none is left. Its reward is -`refusal_penalty`, `parsed` is False, and the next observation
    says what was expected. It takes a turn, and where no other turn is left, it ends the episode without success.
    """

    component = "zoom_text"

    def __init__(self, config: ZoomTextConfig, task: TaskSection) -> None:
        super().__init__(config, task)
        self._config = config

    def step(self, action: Action) -> Transition:
        """Show a region, judge an answer, or refuse."""
        if not action.ended:
            return self._refuse("Your text was cut off.")
        text = action.text.strip()
        if answer := _ANSWER.fullmatch(text):
            return self._judge(answer[1])
        zoom = _ZOOM.fullmatch(text)
        if zoom is None or not self._may_zoom:
            return self._refuse("")
        try:
            return self._zoom(read_box([float(number) for number in zoom.groups()], self._size))
        except BoxError:
            return self._refuse("There is no such region in the image.")

    def _notice(self) -> str:
        return "" if self._may_zoom else self._expected()

    def _expected(self) -> str:
        if not self._may_zoom:
            return "No zoom is left. Expected: answer TEXT"
        width, height = self._size
        return f"Expected: zoom x0 y0 x1 y1 with 0 <= x0 < x1 <= {width}, 0 <= y0 < y1 <= {height}, or answer TEXT"

    def _refuse(self, reason: str) -> Transition:
        over = not self._may_zoom
        self._turns += 1
        return Transition(
            -self._config.refusal_penalty,
            observation=None if over else self._correction(f"{reason} {self._expected()}".strip()),
            terminated=over,
            parsed=False,
            info={"success": False, "zooms": self._zooms},
        )

    def _correction(self, notice: str) -> Observation:
        """What was wrong; with overview and question again where the policy may have lost sight of them."""
        if self._task.history == "all":
            return Observation((Message.user(notice),))
        return self._overview(notice)
