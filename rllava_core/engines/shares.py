"""Which process computes which trajectories of a batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from rllava_core.mdp.trajectory import Trajectory
from rllava_core.policy.policy import PolicyOutput


def shares_of(trajectories: Sequence[Trajectory], processes: int, *, shared: bool = True) -> list[list[int]]:
    """Numbers of the trajectories for each process, about as many tokens each.

    Groups stay whole where there are enough of them, for what their members share is read once. The same everywhere.

    shared: off where it is read for each of them.
    """
    if processes == 1:
        return [list(range(len(trajectories)))]
    groups: dict[int, list[int]] = {}
    for number, trajectory in enumerate(trajectories):
        groups.setdefault(trajectory.group, []).append(number)
    pieces = -(-processes // max(1, len(groups)))
    units = [unit for members in groups.values() for unit in _cut(members, pieces)]
    costs = [_cost([trajectories[number] for number in unit], shared) for unit in units]
    return [sorted(number for place in share for number in units[place]) for share in share_out(costs, processes)]


def share_out(costs: Sequence[int], processes: int) -> list[list[int]]:
    """Numbers of items for each process, in their order: the dearest item first, to the process that has least (Graham
    1969, "Bounds on multiprocessing timing anomalies")."""
    shares: list[list[int]] = [[] for _ in range(processes)]
    totals = [0] * processes
    for number in sorted(range(len(costs)), key=lambda item: (-costs[item], item)):
        least = totals.index(min(totals))
        shares[least].append(number)
        totals[least] += costs[number]
    return [sorted(share) for share in shares]


def in_order(
    parts: Sequence[PolicyOutput], shares: Sequence[Sequence[int]], trajectories: Sequence[Trajectory]
) -> PolicyOutput:
    """What the processes found of their shares, for all trajectories in their own order."""
    order = [number for share in shares for number in share]
    place = torch.tensor(order).argsort()
    rows = torch.arange(sum(item.decisions for item in trajectories))
    found = rows.split([trajectories[number].decisions for number in order])
    index = torch.cat([found[number] for number in place.tolist()])
    return PolicyOutput(
        logprobs=torch.cat([part.logprobs for part in parts])[index],
        entropies=torch.cat([part.entropies for part in parts])[index],
        heads={name: torch.cat([part.heads[name] for part in parts])[index] for name in parts[0].heads},
        final={name: torch.cat([part.final[name] for part in parts])[place] for name in parts[0].final},
    )


def _cut(numbers: Sequence[int], pieces: int) -> list[Sequence[int]]:
    """Consecutive pieces of about one length, none of them empty."""
    size = -(-len(numbers) // pieces)
    return [numbers[begin : begin + size] for begin in range(0, len(numbers), size)]


def _cost(trajectories: Sequence[Trajectory], shared: bool) -> int:
    parts = [trajectory.parts for trajectory in trajectories]
    own = sum(item.own for item in parts)
    if not shared:
        return own + sum(sum(item.begun.values()) for item in parts)
    return own + sum({key: tokens for item in parts for key, tokens in item.begun.items()}.values())
