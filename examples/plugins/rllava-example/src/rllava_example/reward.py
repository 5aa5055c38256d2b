"""A reward against answers that go round in circles."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import BaseModel

from rllava_core.mdp.trajectory import Trajectory


class DistinctWords:
    """Different words / words of the last answer; 0 for an answer without words."""

    def __init__(self, config: BaseModel) -> None:
        pass

    def __call__(self, trajectories: Sequence[Trajectory], /) -> list[float]:
        words = [trajectory.answer.lower().split() for trajectory in trajectories]
        return [len(set(answer)) / len(answer) if answer else 0.0 for answer in words]
