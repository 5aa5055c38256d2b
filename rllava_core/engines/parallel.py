"""How the processes of a run share the work of a step: one alone, DDP, or FSDP2.

Each process computes the gradient of a share of the batch. Under DDP all hold all weights, and gradients are averaged
as they are made. Under FSDP2 (torch's own `fully_shard`, which also shards on a CPU, as accelerate does not) each holds
a part of the trained weights, of their gradients and of the optimizer's states; beside it, a whole copy of the weights
acts, is evaluated and is saved, so that nobody who acts must wait for the others.

What a process does must fit what the others do. Where one of them has no trajectory, or no image, while others have,
it computes a *filler*: a trajectory of the same batch that counts for nothing, so that every weight that is used
anywhere has a gradient everywhere. Without it gradients were silently not averaged.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer
from transformers.modeling_layers import GradientCheckpointingLayer

from rllava_core.algorithms.protocol import Batch
from rllava_core.engines.updates import Update, WholeUpdate
from rllava_core.engines.world import Alone, Processes, World
from rllava_core.errors import ConfigError
from rllava_core.mdp.trajectory import ContextSegment, Trajectory
from rllava_core.policy.policy import Policy

Make = Callable[[Sequence[nn.Parameter]], Optimizer]


@dataclass(frozen=True)
class Pass:
    """One forward and backward pass of one process: a micro-batch, and a trajectory that counts for nothing."""

    batch: Batch | None
    filler: Trajectory | None = None

    @property
    def trajectories(self) -> tuple[Trajectory, ...]:
        own = () if self.batch is None else self.batch.trajectories
        return own if self.filler is None else (*own, self.filler)


class Parallel(Protocol):
    """What differs between one process and several.

    world: the processes.
    trained: the policy whose gradients are computed, not wrapped.
    module: what is called for a pass with gradients.
    packed: whether batches must be packed, so that every layer is called once a pass.
    """

    world: World
    trained: Policy
    module: Callable[..., Any]
    packed: bool

    def prepare(self, make: Make | None, limit: float | None) -> Update | None:
        """Wrap the policy; and unless `make`, of an optimizer of the trained parameters, is None, say how to step.

        limit: largest norm of the gradients, or none.
        """
        ...

    def passes(self, micro_batches: Callable[[int], list[Batch]], batch: Batch) -> list[Pass]:
        """What this process computes. micro_batches: of a process, by its number; batch: all that they are made of."""
        ...

    def reducing(self, last: bool) -> AbstractContextManager[Any]:
        """Around one pass: whether gradients are averaged with it."""
        ...

    def backward(self, loss: Tensor) -> None:
        """The gradients of a pass, added to those of the passes before it."""
        ...

    def stepped(self) -> None:
        """The optimizer has changed the weights."""
        ...

    def whole(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """An optimizer's state as one process alone would have it. All must call it."""
        ...

    def placed(self, state: Mapping[str, Any]) -> Mapping[str, Any]:
        """The opposite of `whole`; the policy's own weights may have been replaced before."""
        ...


class OneProcess:
    """No others."""

    packed = False

    def __init__(self, accelerator: Accelerator, policy: Policy) -> None:
        self.world: World = Alone()
        self.trained = policy
        self.module: Callable[..., Any] = policy
        self._accelerator = accelerator

    def prepare(self, make: Make | None, limit: float | None) -> Update | None:
        if make is None:
            self.module = self._accelerator.prepare(self.trained)
            return None
        self.module, optimizer = self._accelerator.prepare(self.trained, make(trained(self.trained)))
        return WholeUpdate(optimizer, self._clipped, limit)

    def passes(self, micro_batches: Callable[[int], list[Batch]], batch: Batch) -> list[Pass]:
        return [Pass(micro) for micro in micro_batches(self.world.rank)]

    def reducing(self, last: bool) -> AbstractContextManager[Any]:
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        self._accelerator.backward(loss)

    def stepped(self) -> None:
        return

    def whole(self, state: Mapping[str, Any]) -> dict[str, Any]:
        return dict(state)

    def placed(self, state: Mapping[str, Any]) -> Mapping[str, Any]:
        return state

    def _clipped(self, limit: float) -> Tensor:
        return torch.as_tensor(self._accelerator.clip_grad_norm_(self.trained.parameters(), limit))


class Replicated(OneProcess):
    """All weights in every process, by torch's DistributedDataParallel."""

    def __init__(self, accelerator: Accelerator, policy: Policy) -> None:
        super().__init__(accelerator, policy)
        self.world = Processes()

    def passes(self, micro_batches: Callable[[int], list[Batch]], batch: Batch) -> list[Pass]:
        return super().passes(micro_batches, batch) or [Pass(None, _shortest(batch.trajectories))]

    def reducing(self, last: bool) -> AbstractContextManager[Any]:
        context: AbstractContextManager[Any] = nullcontext() if last else self._accelerator.no_sync(self.module)
        return context


class Sharded:
    """A part of the trained weights in every process, by torch's `fully_shard`; and all weights once, to act with."""

    packed = True

    def __init__(self, accelerator: Accelerator, policy: Policy) -> None:
        self.world: World = Processes()
        self._accelerator = accelerator
        self._policy = policy
        kinds = {item.dtype for name, item in policy.named_parameters() if item.requires_grad and "heads." not in name}
        if len(kinds) > 1:
            named = " and ".join(sorted(str(kind).removeprefix("torch.") for kind in kinds))
            raise ConfigError(
                f"engine.train.parallel: fsdp cannot shard trained weights of {named} together: set model.dtype to "
                "float32, or parallel to ddp"
            )
        self.trained = policy.copied()
        self.module: Callable[..., Any] = self.trained

    def prepare(self, make: Make | None, limit: float | None) -> Update | None:
        mesh = torch.distributed.device_mesh.init_device_mesh(self._policy.device.type, (self.world.size,))
        ignored = {item for item in self.trained.parameters() if not item.requires_grad}
        # Heads are called one by one, and may be of another precision than the model.
        units = [*self.trained.heads.values()]
        units += [item for item in self.trained.modules() if isinstance(item, GradientCheckpointingLayer)]
        for unit in units:
            fully_shard(unit, mesh=mesh, ignored_params=ignored)
        fully_shard(self.trained, mesh=mesh, ignored_params=ignored)
        self.module = self._in_precision
        return None if make is None else WholeUpdate(make(trained(self.trained)), self._clipped, limit)

    def passes(self, micro_batches: Callable[[int], list[Batch]], batch: Batch) -> list[Pass]:
        return in_step(self.world, micro_batches, batch)

    def reducing(self, last: bool) -> AbstractContextManager[Any]:
        # With every pass: gradients that wait would be those of all weights.
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        self._accelerator.backward(loss)

    @torch.no_grad()
    def stepped(self) -> None:
        for own, shard in zip(trained(self._policy), trained(self.trained), strict=True):
            own.copy_(_full(shard))

    def whole(self, state: Mapping[str, Any]) -> dict[str, Any]:
        held = {
            number: {name: _full(value).cpu() if isinstance(value, DTensor) else value for name, value in own.items()}
            for number, own in state["state"].items()
        }
        return {**state, "state": held}

    @torch.no_grad()
    def placed(self, state: Mapping[str, Any]) -> Mapping[str, Any]:
        shards = trained(self.trained)
        for own, shard in zip(trained(self._policy), shards, strict=True):
            shard.copy_(_like(own.detach(), shard))
        held = {
            number: {
                name: _like(value, shards[int(number)]) if value.shape == shards[int(number)].shape else value
                for name, value in own.items()
            }
            for number, own in state["state"].items()
        }
        return {**state, "state": held}

    def _clipped(self, limit: float) -> Tensor:
        norm = nn.utils.clip_grad_norm_(trained(self.trained), limit)
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    def _in_precision(self, *arguments: Any, **named: Any) -> Any:
        with self._accelerator.autocast():
            return self.trained(*arguments, **named)


def trained(module: nn.Module) -> list[nn.Parameter]:
    """The parameters that an optimizer steps on."""
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def in_step(world: World, micro_batches: Callable[[int], list[Batch]], batch: Batch) -> list[Pass]:
    """As many passes in every process, of which one uses the same weights everywhere, for processes that wait for each
    other in every pass. The arguments are those of `Parallel.passes`."""
    rounds = [micro_batches(rank) for rank in range(world.size)]
    found = []
    for number in range(max(map(len, rounds))):
        together = [own[number] if number < len(own) else None for own in rounds]
        mine = together[world.rank]
        seen = [item is not None and any(map(_shows, item.trajectories)) for item in together]
        filler = None
        if any(seen) and not seen[world.rank]:
            filler = _shortest([item for item in batch.trajectories if _shows(item)])
        elif mine is None:
            filler = _shortest([item for item in batch.trajectories if not _shows(item)] or batch.trajectories)
        found.append(Pass(mine, filler))
    return found


def _full(value: Tensor) -> Tensor:
    return value.full_tensor() if isinstance(value, DTensor) else value


def _like(value: Tensor, shard: Tensor) -> Tensor:
    """A whole tensor, in parts as `shard` is."""
    if not isinstance(shard, DTensor):
        return value
    # Every process has read the same.
    return distribute_tensor(value.to(shard.device), shard.device_mesh, shard.placements, src_data_rank=None)


def _shows(trajectory: Trajectory) -> bool:
    return any(
        isinstance(segment, ContextSegment) and segment.images for turn in trajectory.turns for segment in turn.context
    )


def _shortest(trajectories: Sequence[Trajectory]) -> Trajectory:
    def length(item: Trajectory) -> int:
        return sum(len(segment.tokens) for segment in (*item.turns[-1].context, item.turns[-1].action))

    return min(trajectories, key=length)
