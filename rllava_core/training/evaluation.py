"""Evaluation: greedy episodes on what was held out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from rllava_core.errors import ConfigError, DataError, TrainingError
from rllava_core.mdp.environment import Start
from rllava_core.mdp.examples import Example
from rllava_core.mdp.rewards import reports, succeeded
from rllava_core.mdp.trajectory import Trajectory
from rllava_core.policy.behaviour import Behaviour
from rllava_core.training.build import Task
from rllava_core.training.episodes import Episodes
from rllava_core.training.processes import score_once
from rllava_core.training.seeds import CHANCE, HELD_OUT, SWAP, derive


@dataclass(frozen=True)
class Evaluation:
    """What held-out episodes gave.

    success_rate: share of episodes that succeeded (see `rllava_core.mdp.rewards.succeeded`).
    return_mean: mean episode return.
    turns_mean: mean number of turns.
    scores: mean of each reward function.
    successes: of each episode, in order.
    unparsable_share: share of turns whose action the environment could not make sense of.
    reports: what the reward functions and the engine say of themselves, such as what calls have cost.
    policy_seconds, environment_seconds: what one turn of one episode took, on average.
    """

    success_rate: float
    return_mean: float
    turns_mean: float
    episodes: int
    policy_seconds: float
    environment_seconds: float
    scores: dict[str, float]
    trajectories: tuple[Trajectory, ...]
    successes: tuple[bool, ...]
    unparsable_share: float = 0.0
    reports: Mapping[str, float] = field(default_factory=dict)

    def summary(self) -> dict[str, float]:
        """As `summary.json` holds it."""
        return {
            "success_rate": self.success_rate,
            "return_mean": self.return_mean,
            "turns_mean": self.turns_mean,
            "episodes": self.episodes,
        }


def evaluate(
    task: Task,
    episodes: Episodes,
    behaviour: Behaviour,
    limit: int | None,
    seed: int,
    chunk: int,
    swap_images: bool = False,
    at_random: bool = False,
) -> Evaluation:
    """One greedy episode for each held-out example, or for `limit` of them (or of seeds), `chunk` at a time.

    behaviour: the algorithm's: how what it has trained acts. Its epsilon is taken as 0.
    swap_images: every question is asked with the images of another example, which shows whether images are seen.
    at_random: every choice is drawn, each as likely as the others: the level of chance, whatever was trained.
    """
    starts = held_out(task, limit, seed)
    if swap_images:
        starts = _swapped(starts, seed)
    behaviour = Behaviour(epsilon=1.0) if at_random else replace(behaviour, epsilon=0.0)
    trajectories: list[Trajectory] = []
    policy_seconds = environment_seconds = 0.0
    for begin in range(0, len(starts), chunk):
        draws = derive(seed, CHANCE, begin) if at_random else None
        played = episodes.play(starts[begin : begin + chunk], 1, draws, behaviour)
        trajectories += [replace(trajectory, group=begin + trajectory.group) for trajectory in played]
        policy_seconds += sum(episodes.timing.policy)
        environment_seconds += sum(episodes.timing.environment)
    if not trajectories:
        raise TrainingError("the environments of all held-out episodes failed before their first turn was done")
    trajectories = score_once(episodes.world, trajectories, task.rewards)
    turns = sum(len(trajectory.turns) for trajectory in trajectories)
    successes = tuple(succeeded(trajectory, task.primary) for trajectory in trajectories)
    return Evaluation(
        success_rate=float(np.mean(successes)),
        return_mean=float(np.mean([trajectory.episode_return for trajectory in trajectories])),
        turns_mean=turns / len(trajectories),
        episodes=len(trajectories),
        policy_seconds=policy_seconds / turns,
        environment_seconds=environment_seconds / turns,
        scores={
            reward.name: float(np.mean([trajectory.scores[reward.name] for trajectory in trajectories]))
            for reward in task.rewards
        },
        trajectories=tuple(trajectories),
        successes=successes,
        unparsable_share=sum(not turn.parsed for trajectory in trajectories for turn in trajectory.turns) / turns,
        reports={**reports(task.rewards), **episodes.report_of_engine()},
    )


def held_out(task: Task, limit: int | None, seed: int) -> list[Start]:
    """Where held-out episodes begin; the same at every evaluation of a run."""
    examples = task.examples("held_out")
    if examples is None:
        if limit is None:
            raise ConfigError(
                "training.eval_episodes: set how many, for without a task.dataset there is no end of held-out episodes"
            )
        return [Start(None, derive(seed, HELD_OUT, number)) for number in range(limit)]
    return [
        Start(example, derive(seed, HELD_OUT, number))
        for number, example in enumerate(examples[: limit or len(examples)])
    ]


def _swapped(starts: Sequence[Start], seed: int) -> list[Start]:
    """Each example with the images of another that has as many: a random permutation that leaves none in its place."""
    examples = [start.example for start in starts if start.example is not None]
    alike: dict[int, list[int]] = {}
    for number in np.random.default_rng(derive(seed, SWAP)).permutation(len(examples)).tolist():
        alike.setdefault(len(examples[number].images), []).append(number)
    alike.pop(0, None)
    if not alike or min(map(len, alike.values())) < 2:
        lonely = [examples[members[0]].name for members in alike.values() if len(members) == 1]
        alone = [f"; no other has as many as {name}" for name in lonely]
        raise DataError(f"swapping images needs two or more held-out examples with equally many{''.join(alone[:1])}")
    donors: list[Example] = list(examples)
    for members in alike.values():
        for place, number in enumerate(members):
            donors[number] = examples[members[place - 1]]  # a cyclic shift moves every example
    return [
        replace(start, example=replace(example, images=donor.images))
        for start, example, donor in zip(starts, examples, donors, strict=True)
    ]
