"""What one turn of an episode costs as the conversation grows, with `history: all`: turn 2 against turn 20.

Sixteen episodes of the tiny Qwen2-VL are stepped together; each turn shows a new frame and a line of text, and is
answered by a choice or by free text. The key-value cache is kept across turns, so that a turn reads its own observation
only; for comparison the same turns are sampled by an engine that is made to forget after each.

    python benchmarks/turns.py [--episodes 16] [--turns 20] [--repeats 5]
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable

import numpy as np
import torch

from rllava_core.engines.config import LocalRolloutConfig
from rllava_core.engines.local_rollout import LocalRolloutEngine
from rllava_core.engines.protocol import RolloutSetup
from rllava_core.mdp.environment import Start
from rllava_core.mdp.examples import Example
from rllava_core.mdp.images import Image
from rllava_core.mdp.messages import Action, Message, Observation, Transition
from rllava_core.mdp.pool import LocalEnvironments
from rllava_core.mdp.trajectory import ActionSegment
from rllava_core.policy.behaviour import Behaviour
from rllava_core.policy.media import MediaStore
from rllava_core.policy.policy import Policy
from rllava_core.policy.sampling import Request
from rllava_core.training.episodes import Episodes, Limits
from rllava_qwen2vl.adapter import Qwen2VL
from rllava_qwen2vl.config import Qwen2VLOptions


class Corridor:
    """A new random frame of 32×32 pixels (16 image tokens) in every turn."""

    def __init__(self, choices: tuple[str, ...] | None) -> None:
        self.choices = choices

    def reset(self, *, seed: int, example: Example | None) -> Observation:
        self._generator = np.random.default_rng(seed)
        return self._show()

    def step(self, action: Action) -> Transition:
        return Transition(0.0, self._show(), terminated=False)

    def _show(self) -> Observation:
        frame = Image.from_array(self._generator.integers(0, 256, (32, 32, 3), dtype=np.uint8))
        return Observation((Message.user(frame, "Where now?"),), self.choices)


class Forgetful:
    """The same engine without a memory of earlier turns."""

    def __init__(self, engine: LocalRolloutEngine) -> None:
        self._engine = engine

    def generate(
        self, requests: list[Request], seed: int | None, behaviour: Behaviour | None = None
    ) -> list[list[ActionSegment]]:
        self._engine.forget()
        return self._engine.generate(requests, seed, behaviour)

    def forget(self) -> None:
        self._engine.forget()

    def sync(self, policy: Policy) -> None:
        self._engine.sync(policy)


def seconds_per_turn(
    sampler_of: Callable[[LocalRolloutEngine], object],
    choices: tuple[str, ...] | None,
    episodes: int,
    turns: int,
    repeats: int,
) -> list[float]:
    """Median seconds of the policy in each turn."""
    adapter = Qwen2VL(Qwen2VLOptions(from_scratch="tiny"))
    torch.manual_seed(0)
    policy = Policy(adapter, adapter.load()).eval()
    media = MediaStore(adapter)
    engine = LocalRolloutEngine(LocalRolloutConfig(), RolloutSetup(policy, media, torch.no_grad))
    limits = Limits(max_new_tokens=4, max_turns=turns, max_episode_tokens=None, history="all")
    player = Episodes(adapter, media, sampler_of(engine), LocalEnvironments(lambda: Corridor(choices)), limits)
    measured = []
    for repeat in range(repeats + 1):
        player.play([Start(None, 1000 * repeat + number) for number in range(episodes)], 1, seed=repeat)
        measured.append(player.timing.policy)
    return [statistics.median(column) for column in zip(*measured[1:], strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--episodes", type=int, default=16)
    parser.add_argument("--turns", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    kinds = {"choices of one token": ("l", "r", "f"), "choices of several": ("left", "right", "ahead"), "text": None}
    print(f"{arguments.episodes} episodes, ms a turn   turn 2   turn {arguments.turns}   ratio")
    for name, choices in kinds.items():
        for memory, sampler_of in {"kept": lambda engine: engine, "read anew": Forgetful}.items():
            times = seconds_per_turn(sampler_of, choices, arguments.episodes, arguments.turns, arguments.repeats)
            early, late = times[1], times[-1]
            print(f"{name + ', ' + memory:<32} {1000 * early:8.1f} {1000 * late:9.1f} {late / early:7.2f}")


if __name__ == "__main__":
    main()
