"""How far an agent's episodes are from the shortest ones, in MiniGrid rooms without doors or objects to carry.

    rllava eval RUN_DIR                      (writes RUN_DIR/eval/answers.jsonl)
    python benchmarks/shortest_paths.py RUN_DIR

For each held-out seed, the shortest sequence of turns and steps to the goal is found by breadth-first search over
places and directions, and compared with the number of turns that the agent took; a failed episode counts with the turns
it used up. A policy of random actions is played beside it, with the limits of the run.
"""

from __future__ import annotations

import json
import sys
from collections import deque
from pathlib import Path
from typing import Any

import gymnasium
import minigrid
import numpy as np
import yaml

from rllava_core.training.seeds import HELD_OUT, derive

STEPS = ((1, 0), (0, 1), (-1, 0), (0, -1))
"""What a step forward changes, for MiniGrid's directions 0 to 3."""


def shortest(environment: Any) -> int:
    """Fewest turns from where the agent is to the goal."""
    world = environment.unwrapped
    start = (*map(int, world.agent_pos), int(world.agent_dir))
    seen, queue = {start}, deque([(start, 0)])
    while queue:
        (x, y, direction), length = queue.popleft()
        cell = world.grid.get(x, y)
        if cell is not None and cell.type == "goal":
            return length
        ahead = (x + STEPS[direction][0], y + STEPS[direction][1])
        moves = [(x, y, (direction + 1) % 4), (x, y, (direction - 1) % 4)]
        cell = world.grid.get(*ahead)
        if cell is None or cell.can_overlap():
            moves.append((*ahead, direction))
        for place in moves:
            if place not in seen:
                seen.add(place)
                queue.append((place, length + 1))
    raise ValueError("the goal cannot be reached")


def random_episode(environment: Any, seed: int, limit: int) -> tuple[bool, int]:
    """Whether random turns and steps reach the goal, and how many they took."""
    generator = np.random.default_rng(seed)
    environment.reset(seed=seed)
    for turn in range(1, limit + 1):
        _, reward, terminated, truncated, _ = environment.step(int(generator.integers(3)))
        if terminated or truncated:
            return reward > 0, turn
    return False, limit


def main() -> None:
    run = Path(sys.argv[1])
    config = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    lines = (run / "eval" / "answers.jsonl").read_text(encoding="utf-8").splitlines()
    answers = [json.loads(line) for line in lines]
    task = config["task"]
    gymnasium.register_envs(minigrid)
    environment = gymnasium.make(task["environment"]["id"])
    best, chance = [], []
    for number in range(len(answers)):
        seed = derive(config["training"]["seed"], HELD_OUT, number)
        environment.reset(seed=seed)
        best.append(shortest(environment))
        chance.append(random_episode(environment, seed, task["max_turns"]))
    turns = np.array([answer["turns"] for answer in answers])
    success = np.mean([answer["success"] for answer in answers])
    print(f"{len(answers)} held-out seeds   success   mean turns   / shortest")
    print(f"agent             {success:14.3f} {turns.mean():12.2f} {turns.mean() / np.mean(best):12.2f}")
    lengths = np.mean([length for _, length in chance])
    share = np.mean([found for found, _ in chance])
    print(f"random actions    {share:14.3f} {lengths:12.2f} {lengths / np.mean(best):12.2f}")
    print(f"shortest          {1:14.3f} {np.mean(best):12.2f}")


if __name__ == "__main__":
    main()
