"""The processes of a run: what each of them knows of the others.

Every process runs the same loop on the same step: it plays a share of the episodes, all processes then hold all
trajectories, an algorithm prepares the whole batch everywhere alike, and each process computes the gradient of a share
of it. So nothing but playing, evaluating and stepping knows that there are others.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any, Protocol, TypeVar

import torch

from rllava_core.errors import RllavaError, TrainingError

T = TypeVar("T")


class World(Protocol):
    """rank: number of this process; size: how many there are."""

    rank: int
    size: int

    def gathered(self, own: T) -> list[T]:
        """What every process brought, in the order of their numbers. All must call it."""
        ...

    def close(self) -> None:
        """The others are not needed any more."""
        ...


class Alone:
    """One process."""

    rank = 0
    size = 1

    def gathered(self, own: T) -> list[T]:
        return [own]

    def close(self) -> None:
        return


class Processes:
    """Processes that torch.distributed has put together.

    Raises TrainingError where one of them is gone or does not answer within the time-out of their group.
    """

    def __init__(self) -> None:
        self.rank = torch.distributed.get_rank()
        self.size = torch.distributed.get_world_size()
        # On the CPU, whatever the device: what is gathered are records, not tensors. Pickled, between processes that
        # run the same code as the same user.
        group = torch.distributed.new_group(backend="gloo")
        assert isinstance(group, torch.distributed.ProcessGroup)
        self._group = group

    def gathered(self, own: T) -> list[T]:
        found: list[Any] = [None] * self.size
        with lost(self):
            torch.distributed.all_gather_object(found, own, group=self._group)
        return found

    def close(self) -> None:
        # The group's threads end with its last reference. One that is still there when the interpreter goes, and has a
        # tensor to give back, aborts the process. The first group of all is accelerate's, and may be used again.
        group = self._group
        del self._group
        torch.distributed.destroy_process_group(group)


class lost:  # noqa: N801 - reads as what it is about
    """A context in which a process that is gone becomes a TrainingError that says so."""

    def __init__(self, world: World) -> None:
        self._world = world

    def __enter__(self) -> None:
        return

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, RuntimeError) and not isinstance(error, RllavaError) and _is_of_transport(error):
            others = [str(rank) for rank in range(self._world.size) if rank != self._world.rank]
            first_line = str(error).strip().splitlines()[0][:200]
            raise TrainingError(
                f"process {self._world.rank} of {self._world.size} waited for process {' or '.join(others)}, which "
                f"ended or does not answer ({first_line}); its own message says why, if it could write one"
            ) from error


def _is_of_transport(error: RuntimeError) -> bool:
    """Whether a collective failed, and not what it was to transport."""
    if isinstance(error, torch.distributed.DistBackendError | torch.distributed.DistNetworkError):
        return True
    words = ("Connection closed by peer", "Connection reset by peer", "Timed out waiting", "gloo", "Broken pipe")
    return any(word in str(error) for word in words)


def together(world: World, function: Callable[[], T]) -> list[T]:
    """What a function returns in every process. Where it raises a RllavaError in one, all raise the first of them."""
    own: tuple[T | None, RllavaError | None]
    try:
        own = (function(), None)
    except RllavaError as error:
        if world.size == 1:
            raise
        own = (None, error)
    found = world.gathered(own)
    failed = next((error for _, error in found if error is not None), None)
    if failed is not None:
        failed.everywhere = True
        raise failed
    return [result for result, _ in found]  # type: ignore[misc]


def summed(world: World, values: Mapping[str, float]) -> dict[str, float]:
    """Sums over all processes, by name; one that has no such value adds nothing."""
    totals: dict[str, float] = defaultdict(float)
    for own in world.gathered(dict(values)):
        for name, value in own.items():
            totals[name] += value
    return dict(totals)
