"""Reward functions: of trajectories, each reported by its own name, combined by weights."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from rllava_core.errors import RewardError, RllavaError, describe
from rllava_core.mdp.trajectory import Trajectory


class Reward(Protocol):
    """A function of a batch of trajectories. The target of a `reward` component, called with its config.

    Returns one finite number a trajectory, in order. Called once a step with the whole batch, so that a reward may
    compare trajectories or make its calls to the outside concurrently.

    It may also have a method `report() -> Mapping[str, float]`, which is asked once a step and once an evaluation for
    what else there is to say since it was last asked, such as what calls to the outside have cost; reported as
    `reward/NAME/KEY`.
    """

    def __call__(self, trajectories: Sequence[Trajectory], /) -> Sequence[float]: ...


@dataclass(frozen=True)
class WeightedReward:
    """One entry of `task.rewards`."""

    name: str
    weight: float
    function: Reward


def score(trajectories: Sequence[Trajectory], rewards: Sequence[WeightedReward]) -> list[Trajectory]:
    """Trajectories with `scores` by name and their weighted sum filled in.

    Raises RewardError that names the reward and the example if a function raises, returns another number of values,
    or a value that is not a finite number.
    """
    return with_scores(trajectories, scores_of(trajectories, rewards), rewards)


def scores_of(trajectories: Sequence[Trajectory], rewards: Sequence[WeightedReward]) -> dict[str, list[float]]:
    """By the name of each reward, what it says of each trajectory. Raises RewardError as `score` does."""
    return {reward.name: _values(reward, trajectories) for reward in rewards}


def with_scores(
    trajectories: Sequence[Trajectory], columns: Mapping[str, Sequence[float]], rewards: Sequence[WeightedReward]
) -> list[Trajectory]:
    """Trajectories with `scores` of these columns and their weighted sum filled in."""
    weights = {reward.name: reward.weight for reward in rewards}
    scored = []
    for index, trajectory in enumerate(trajectories):
        scores = {name: column[index] for name, column in columns.items()}
        total = sum(weights[name] * value for name, value in scores.items())
        scored.append(replace(trajectory, scores=scores, score=total))
    return scored


def reports(rewards: Sequence[WeightedReward]) -> dict[str, float]:
    """What rewards that have a `report` say of themselves, as metrics.

    Raises RewardError that names the reward if that raises or is not made of finite numbers by name.
    """
    return {
        f"reward/{reward.name}/{key}": value
        for reward in rewards
        for key, value in reported(reward.function, f"reward {reward.name!r}", RewardError).items()
    }


def reported(component: object, name: str, failure: type[Exception]) -> dict[str, float]:
    """What a component's optional `report()` says; nothing if it has none. Raises `failure` that names it."""
    report = getattr(component, "report", None)
    if report is None:
        return {}
    try:
        found = {str(key): float(value) for key, value in dict(report()).items()}
    except (Exception, SystemExit) as error:
        raise failure(f"{name}: report() {describe(error)}; it must return numbers by name") from error
    for key, value in found.items():
        if not math.isfinite(value):
            raise failure(f"{name}: report() says that {key} is {value}; it must be finite")
    return found


def succeeded(trajectory: Trajectory, primary: str | None) -> bool:
    """Whether an episode succeeded.

    What `info["success"]` says, else whether the primary reward (the first of the task) is 1, else a positive return.
    """
    if "success" in trajectory.info:
        return bool(trajectory.info["success"])
    if primary is not None:
        return trajectory.scores[primary] >= 1.0 - 1e-6
    return trajectory.episode_return > 0


def _values(reward: WeightedReward, trajectories: Sequence[Trajectory]) -> list[float]:
    try:
        answer: object = reward.function(trajectories)
        returned = list(answer) if isinstance(answer, Iterable) else None
    except RllavaError as error:  # the reward's own message
        raise type(error)(f"reward {reward.name!r}: {error}") from error
    except (Exception, SystemExit) as error:
        culprit = _find_culprit(reward, trajectories)
        raise RewardError(f"reward {reward.name!r} {describe(error)}, {culprit}; nothing was trained on it") from error
    if returned is None:
        raise RewardError(
            f"reward {reward.name!r} returned {answer!r} for {len(trajectories)} trajectories; it must return a "
            "list of one number for each"
        )
    if len(returned) != len(trajectories):
        first = f" (first: {_describe(trajectories[0])})" if trajectories else ""
        raise RewardError(
            f"reward {reward.name!r} returned {len(returned)} values for {len(trajectories)} trajectories{first}; it "
            "must return one number for each"
        )
    values = []
    for trajectory, value in zip(trajectories, returned, strict=True):
        try:
            if isinstance(value, str | bytes):  # which float() would read
                raise TypeError
            number = float(value)
        except (TypeError, ValueError, OverflowError):
            raise RewardError(
                f"reward {reward.name!r} returned {value!r} for {_describe(trajectory)}; it must return a number"
            ) from None
        if not math.isfinite(number):
            raise RewardError(
                f"reward {reward.name!r} returned {number} for {_describe(trajectory)}; it must be finite"
            )
        values.append(number)
    return values


def _find_culprit(reward: WeightedReward, trajectories: Sequence[Trajectory]) -> str:
    """Which trajectory makes the reward raise, tried one by one only after the batch has failed."""
    for trajectory in trajectories:
        try:
            list(reward.function([trajectory]))
        except (Exception, SystemExit):  # noqa: BLE001 - looking for it; the caller raises the original error
            return f"on {_describe(trajectory)}"
    return f"on a batch of {len(trajectories)}, but on none of them alone"


def _describe(trajectory: Trajectory) -> str:
    return f"example {trajectory.name}, answer {trajectory.answer[:80]!r}"
