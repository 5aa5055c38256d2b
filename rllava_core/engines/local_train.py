"""Training in this process, on accelerate: device, mixed precision, micro-batches, clipping, AdamW; and what a process
shares with others."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs

from rllava_core.algorithms.protocol import Batch, Loss, LossFunction
from rllava_core.engines.config import LocalTrainConfig
from rllava_core.engines.offloading import kept_on_host
from rllava_core.engines.parallel import OneProcess, Parallel, Pass, Replicated, Sharded, trained
from rllava_core.engines.protocol import TrainSetup
from rllava_core.engines.shares import in_order, shares_of
from rllava_core.engines.updates import StreamedUpdate, Update, optimizer_of
from rllava_core.engines.world import lost, summed
from rllava_core.errors import ConfigError, TrainingError
from rllava_core.mdp.trajectory import Segment, Trajectory
from rllava_core.policy.batch import BatchBuilder, PolicyBatch
from rllava_core.policy.policy import Policy, PolicyOutput
from rllava_core.policy.trained import load_part_state, part_state, trained_names


class LocalTrainEngine:
    """One device; one process, or one of several that compute a step together.

    several: how several processes share a step, instead of what the config says.
    """

    def __init__(
        self,
        config: LocalTrainConfig,
        setup: TrainSetup,
        several: Callable[[Accelerator, Policy], Parallel] | None = None,
    ) -> None:
        if config.device == "cuda" and not torch.cuda.is_available():
            raise ConfigError("engine.train.device is cuda, but torch finds no CUDA device; use auto or cpu")
        self.policy = setup.policy
        self._media = setup.media
        self._training = setup.training
        self._accelerator = _accelerator(config, {BY_CPU, BY_FSDP} if several is None else {BY_CPU})
        # Moved first: a fused optimizer must be built on parameters that are where they will stay.
        self.policy.to(self._accelerator.device)
        _check_options(config, setup)
        streamed = config.optimizer_on_cpu or config.stochastic_rounding or config.step_in_backward
        if several is None or self._accelerator.num_processes == 1:
            self._parallel = _parallel(config, self._accelerator, self.policy, streamed=streamed)
        else:
            self._parallel = several(self._accelerator, self.policy)
        self.world = self._parallel.world
        packed = config.checkpoint_activations or not config.prefix_sharing or self._parallel.packed
        trees = self.policy.adapter.takes_trees
        # A packed row without trees has one answer, so that nothing of its prompt is shared.
        shared = config.prefix_sharing and (trees or not packed)
        self._layout = {"packed": packed, "shared": shared}
        self.layout = ("packed" if packed else "shared" if trees else "rows") if shared else "unshared"
        self._offload = config.offload_activations
        self._parallel.trained.recompute(config.checkpoint_activations)
        make = optimizer_of(config, setup.training)
        limit = setup.training.max_grad_norm
        self._update: Update = self._parallel.prepare(None if streamed else make, limit) or StreamedUpdate(
            trained(self.policy),
            make,
            limit,
            on_cpu=config.optimizer_on_cpu,
            at_once=config.step_in_backward,
            stochastic=config.stochastic_rounding,
        )
        # Dropout would make the log-probs of sampling and training differ.
        self.policy.eval()
        self._parallel.trained.eval()
        self._copies = dict(setup.copies)
        self._updated: set[str] = set()
        for copy in self._copies.values():
            copy.to(self._accelerator.device).eval().requires_grad_(False)

    def step(self, batch: Batch, loss: LossFunction, learning_rate: float) -> dict[str, float]:
        metrics: dict[str, float] = defaultdict(float)
        shares = self._shares(batch.trajectories)
        passes = self._parallel.passes(lambda rank: list(self._split(batch.chosen(shares[rank]))), batch)
        self._update.begin(len(passes), learning_rate)
        wrong = None
        with lost(self.world):
            for number, item in enumerate(passes):
                with self._parallel.reducing(number == len(passes) - 1):
                    with self._saving():
                        output = self._parallel.module(self._pack(item.trajectories), adds_up=True)
                        result = self._loss(item, output, loss)
                    if not torch.isfinite(result.total):
                        wrong = f"the loss became {result.total.item()} on {_describe(item.batch or batch)}"
                        if self.world.size == 1:
                            raise TrainingError(wrong)
                    self._parallel.backward(result.total)
                for name, value in result.metrics.items():
                    metrics[name] += float(value)
            norm = self._update.finish()
        if not torch.isfinite(norm):
            # Of several processes, each knows now, and the one whose loss it was says where.
            raise TrainingError(wrong or f"the gradient became non-finite on {_describe(batch)}")
        self._parallel.stepped()
        found = summed(self.world, metrics)
        return {**found, "policy/grad_norm": float(norm), "policy/learning_rate": learning_rate}

    def _loss(self, item: Pass, output: PolicyOutput, loss: LossFunction) -> Loss:
        """The loss of a pass; processes average gradients, and a step's loss is a sum."""
        if self.world.size == 1:
            assert item.batch is not None
            return loss(item.batch.to(self.policy.device), output)
        own = 0 if item.batch is None else sum(trajectory.decisions for trajectory in item.batch.trajectories)
        # Whatever was computed takes part, if only by nothing: another process may wait for its gradients.
        heads = [values.sum() for values in output.heads.values()]
        nothing = 0.0 * torch.stack([output.logprobs[own:].sum(), *heads]).sum()
        if item.batch is None:
            return Loss(nothing, {})
        columns = {name: values[:own] for name, values in output.heads.items()}
        seen = PolicyOutput(output.logprobs[:own], output.entropies[:own], columns)
        result = loss(item.batch.to(self.policy.device), seen)
        return Loss(result.total * self.world.size + nothing, result.metrics)

    def evaluate(self, trajectories: Sequence[Trajectory], copy: str | None = None) -> PolicyOutput:
        policy = self.policy if copy is None else self._copy(copy)
        shares = self._shares(trajectories)
        own = self._evaluate([trajectories[number] for number in shares[self.world.rank]], policy)
        return own if self.world.size == 1 else in_order(self.world.gathered(own), shares, trajectories)

    def _evaluate(self, trajectories: Sequence[Trajectory], policy: Policy) -> PolicyOutput:
        nothing = torch.zeros(0)
        with torch.no_grad(), self.autocast():
            # Packed as for a step, so that on unchanged weights a step finds the very same numbers.
            micro_batches = self._split(Batch(tuple(trajectories), {}))
            outputs = [policy(self._pack(micro.trajectories)) for micro in micro_batches]
            final = self._final(policy, trajectories)
        heads = {
            name: torch.cat([torch.zeros(0, _width(head)), *(output.heads[name].float().cpu() for output in outputs)])
            for name, head in policy.heads.items()
        }
        return PolicyOutput(
            logprobs=torch.cat([nothing, *(output.logprobs.float().cpu() for output in outputs)]),
            entropies=torch.cat([nothing, *(output.entropies.float().cpu() for output in outputs)]),
            heads=heads,
            final=final,
        )

    def _final(self, policy: Policy, trajectories: Sequence[Trajectory]) -> dict[str, torch.Tensor]:
        """Heads in the states that truncated trajectories were left in, zeros for the others: [N, size] each."""
        final = {
            name: torch.zeros(len(trajectories), head.out_features)
            for name, head in policy.heads.items()
            if isinstance(head, torch.nn.Linear)
        }
        left = [(number, item.final) for number, item in enumerate(trajectories) if item.final is not None]
        for chunk in _chunks(left if final else [], self._training.micro_batch_tokens):
            builder = BatchBuilder(policy.adapter, self._media)
            rows = [builder.add_context(context, trajectories[number].name) for number, context in chunk]
            numbers = [number for number, _ in chunk]
            for name, values in policy.context_heads(builder.build().to(policy.device)).items():
                final[name][numbers] = values[rows].float().cpu()
        return final

    @torch.no_grad()
    def update_copy(self, copy: str, rate: float = 1.0) -> None:
        target = self._copy(copy)
        for old, new in zip(target.parameters(), self.policy.parameters(), strict=True):
            if new.requires_grad:
                old.lerp_(new, rate)
        self._updated.add(copy)

    def autocast(self) -> AbstractContextManager[Any]:
        context: AbstractContextManager[Any] = self._accelerator.autocast()
        return context

    def state_dict(self) -> dict[str, Any]:
        # A copy that was never updated is the policy that training began with, which is made again from the config.
        names = trained_names(self.policy)
        copies = {name: part_state(self._copies[name], names) for name in sorted(self._updated)}
        update = self._update.state_dict()
        if "optimizer" in update:
            update = {**update, "optimizer": self._parallel.whole(update["optimizer"])}
        return {"update": update, "copies": copies}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        update = state["update"]
        if "optimizer" in update:
            update = {**update, "optimizer": self._parallel.placed(update["optimizer"])}
        self._update.load_state_dict(update)
        for name, weights in state["copies"].items():
            load_part_state(self._copy(name), trained_names(self.policy), weights)
            self._updated.add(name)

    def close(self) -> None:
        self.world.close()

    def _copy(self, name: str) -> Policy:
        if name not in self._copies:
            kept = ", ".join(self._copies) or "none"
            raise TrainingError(f"there is no copy {name!r} of the policy; the algorithm's `copies` are: {kept}")
        return self._copies[name]

    def _shares(self, trajectories: Sequence[Trajectory]) -> list[list[int]]:
        return shares_of(trajectories, self.world.size, shared=self._layout["shared"])

    def _split(self, batch: Batch) -> Iterator[Batch]:
        return batch.split(self._training.micro_batch_tokens, shared=self._layout["shared"])

    def _pack(self, trajectories: Sequence[Trajectory]) -> PolicyBatch:
        builder = BatchBuilder(self.policy.adapter, self._media, **self._layout)
        for trajectory in trajectories:
            builder.add_trajectory(trajectory)
        return builder.build().to(self.policy.device)

    def _saving(self) -> AbstractContextManager[Any]:
        """Where what backward needs is kept."""
        return kept_on_host(self.policy) if self._offload else nullcontext()


BY_CPU, BY_FSDP = "ACCELERATE_USE_CPU", "ACCELERATE_USE_FSDP"
"""What accelerate's own config may ask for, by the names that its launcher hands on."""


def _accelerator(config: LocalTrainConfig, followed: Set[str]) -> Accelerator:
    """Raises ConfigError for a config of accelerate that asks for what is not followed."""
    asked = sorted(
        name
        for name, value in os.environ.items()
        if name.startswith("ACCELERATE_USE_") and name not in followed and value.lower() in ("true", "1", "yes")
    )
    if asked:
        raise ConfigError(
            f"accelerate's launcher sets {asked[0]}, which is not followed: engine.train says how processes share a "
            "step, so launch without it"
        )
    cpu = config.device == "cpu" or not torch.accelerator.is_available()
    accelerator = Accelerator(
        cpu=cpu,
        mixed_precision=config.mixed_precision,
        kwargs_handlers=[
            # A batch without images leaves the vision part unused, and nobody knows before.
            DistributedDataParallelKwargs(find_unused_parameters=True, broadcast_buffers=False),
            InitProcessGroupKwargs(timeout=timedelta(seconds=config.timeout)),
        ],
    )
    # One that refuses its options and goes would look to a later one like a connection that was lost.
    accelerator.wait_for_everyone()
    return accelerator


def _parallel(config: LocalTrainConfig, accelerator: Accelerator, policy: Policy, *, streamed: bool) -> Parallel:
    """Raises ConfigError for options that several processes cannot keep."""
    if accelerator.num_processes == 1:
        return OneProcess(accelerator, policy)
    asked = os.environ.get(BY_FSDP, "false").lower() == "true"
    sharded = config.parallel == "fsdp" or (config.parallel == "auto" and asked)
    names = ("optimizer_on_cpu", "stochastic_rounding", "step_in_backward")
    if streamed:
        chosen = next(name for name in names if getattr(config, name))
        raise ConfigError(
            f"engine.train.{chosen} takes gradients as they are made, before several processes have averaged them: set "
            "it to false; parallel: fsdp divides states and gradients by the number of processes instead"
        )
    if sharded and config.optimizer != "adamw":
        raise ConfigError(
            f"engine.train.optimizer {config.optimizer} cannot step on parts of weights: use adamw, or parallel: ddp"
        )
    return Sharded(accelerator, policy) if sharded else Replicated(accelerator, policy)


def _width(head: torch.nn.Module) -> int:
    assert isinstance(head, torch.nn.Linear)
    return head.out_features


def _check_options(config: LocalTrainConfig, setup: TrainSetup) -> None:
    """Raises ConfigError for options that contradict each other or the rest of the config."""
    if config.step_in_backward and setup.training.max_grad_norm is not None:
        raise ConfigError(
            "engine.train.step_in_backward steps before all gradients are known, so that nothing can be clipped: set "
            "training.max_grad_norm=null"
        )
    if config.step_in_backward and config.optimizer_on_cpu:
        raise ConfigError(
            "engine.train.step_in_backward and optimizer_on_cpu are two ways not to hold all gradients: choose one"
        )
    kinds = {item.dtype for item in setup.policy.parameters() if item.requires_grad}
    if config.stochastic_rounding and torch.bfloat16 not in kinds:
        raise ConfigError(
            "engine.train.stochastic_rounding rounds to bfloat16, and no weight that is trained is one: set "
            "model.dtype=bfloat16, or stochastic_rounding=false"
        )


def _chunks(
    contexts: Sequence[tuple[int, tuple[Segment, ...]]], tokens: int
) -> Iterator[list[tuple[int, tuple[Segment, ...]]]]:
    """Consecutive contexts of at most `tokens` tokens together; a longer one goes alone."""
    chunk: list[tuple[int, tuple[Segment, ...]]] = []
    spent = 0
    for number, context in contexts:
        length = sum(len(segment.tokens) for segment in context)
        if chunk and spent + length > tokens:
            yield chunk
            chunk, spent = [], 0
        chunk.append((number, context))
        spent += length
    if chunk:
        yield chunk


def _describe(batch: Batch) -> str:
    names = list(dict.fromkeys(trajectory.name for trajectory in batch.trajectories))
    shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
    returns = [trajectory.episode_return for trajectory in batch.trajectories]
    return (
        f"{len(batch.trajectories)} trajectories of {shown} "
        f"(returns {min(returns):.4g} to {max(returns):.4g}, {sum(t.decisions for t in batch.trajectories)} decisions)"
    )
