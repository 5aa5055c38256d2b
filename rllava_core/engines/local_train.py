"""Training in this process, on accelerate: device, mixed precision, micro-batches, clipping, AdamW."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator

from rllava_core.algorithms.protocol import Batch, LossFunction
from rllava_core.engines.config import LocalTrainConfig
from rllava_core.engines.offloading import kept_on_host
from rllava_core.engines.protocol import TrainSetup
from rllava_core.engines.updates import StreamedUpdate, Update, WholeUpdate, optimizer_of
from rllava_core.errors import ConfigError, TrainingError
from rllava_core.mdp.trajectory import Segment, Trajectory
from rllava_core.policy.batch import BatchBuilder, PolicyBatch
from rllava_core.policy.policy import Policy, PolicyOutput
from rllava_core.policy.trained import load_part_state, part_state, trained_names


class LocalTrainEngine:
    """One process and one device."""

    def __init__(self, config: LocalTrainConfig, setup: TrainSetup) -> None:
        if config.device == "cuda" and not torch.cuda.is_available():
            raise ConfigError("engine.train.device is cuda, but torch finds no CUDA device; use auto or cpu")
        self.policy = setup.policy
        self._media = setup.media
        self._training = setup.training
        self._accelerator = Accelerator(cpu=config.device == "cpu", mixed_precision=config.mixed_precision)
        # Moved first: a fused optimizer must be built on parameters that are where they will stay.
        self.policy.to(self._accelerator.device)
        _check_options(config, setup)
        packed = config.checkpoint_activations or not config.prefix_sharing
        trees = self.policy.adapter.takes_trees
        # A packed row without trees has one answer, so that nothing of its prompt is shared.
        shared = config.prefix_sharing and (trees or not packed)
        self._layout = {"packed": packed, "shared": shared}
        self.layout = ("packed" if packed else "shared" if trees else "rows") if shared else "unshared"
        self._offload = config.offload_activations
        self.policy.recompute(config.checkpoint_activations)
        trained = [parameter for parameter in self.policy.parameters() if parameter.requires_grad]
        make = optimizer_of(config, setup.training)
        limit = setup.training.max_grad_norm
        self._update: Update
        if config.optimizer_on_cpu or config.stochastic_rounding or config.step_in_backward:
            self._wrapped = self._accelerator.prepare(self.policy)
            self._update = StreamedUpdate(
                trained,
                make,
                limit,
                on_cpu=config.optimizer_on_cpu,
                at_once=config.step_in_backward,
                stochastic=config.stochastic_rounding,
            )
        else:
            self._wrapped, optimizer = self._accelerator.prepare(self.policy, make(trained))
            self._update = WholeUpdate(optimizer, partial(_clipped, self._accelerator, self.policy), limit)
        # Dropout would make the log-probs of sampling and training differ.
        self.policy.eval()
        self._copies = dict(setup.copies)
        self._updated: set[str] = set()
        for copy in self._copies.values():
            copy.to(self._accelerator.device).eval().requires_grad_(False)

    def step(self, batch: Batch, loss: LossFunction, learning_rate: float) -> dict[str, float]:
        metrics: dict[str, float] = defaultdict(float)
        micro_batches = list(self._split(batch))
        self._update.begin(len(micro_batches), learning_rate)
        for number, micro in enumerate(micro_batches):
            with self._without_reduction(number < len(micro_batches) - 1):
                with self._saving():
                    result = loss(micro.to(self.policy.device), self._wrapped(self._pack(micro.trajectories)))
                if not torch.isfinite(result.total):
                    raise TrainingError(f"the loss became {result.total.item()} on {_describe(micro)}")
                self._accelerator.backward(result.total)
            for name, value in result.metrics.items():
                metrics[name] += float(value)
        norm = self._update.finish()
        if not torch.isfinite(norm):
            raise TrainingError(f"the gradient became non-finite on {_describe(batch)}")
        return {**metrics, "policy/grad_norm": float(norm), "policy/learning_rate": learning_rate}

    def evaluate(self, trajectories: Sequence[Trajectory], copy: str | None = None) -> PolicyOutput:
        policy = self.policy if copy is None else self._copy(copy)
        with torch.no_grad(), self.autocast():
            # Packed as for a step, so that on unchanged weights a step finds the very same numbers.
            micro_batches = self._split(Batch(tuple(trajectories), {}))
            outputs = [policy(self._pack(micro.trajectories)) for micro in micro_batches]
            final = self._final(policy, trajectories)
        return PolicyOutput(
            logprobs=torch.cat([output.logprobs for output in outputs]).float().cpu(),
            entropies=torch.cat([output.entropies for output in outputs]).float().cpu(),
            heads={name: torch.cat([output.heads[name] for output in outputs]).float().cpu() for name in policy.heads},
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
        return {"update": self._update.state_dict(), "copies": copies}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._update.load_state_dict(state["update"])
        for name, weights in state["copies"].items():
            load_part_state(self._copy(name), trained_names(self.policy), weights)
            self._updated.add(name)

    def _copy(self, name: str) -> Policy:
        if name not in self._copies:
            kept = ", ".join(self._copies) or "none"
            raise TrainingError(f"there is no copy {name!r} of the policy; the algorithm's `copies` are: {kept}")
        return self._copies[name]

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

    def _without_reduction(self, postponed: bool) -> AbstractContextManager[Any]:
        """Gradients of all micro-batches but the last stay on their process."""
        context: AbstractContextManager[Any] = self._accelerator.no_sync(self._wrapped) if postponed else nullcontext()
        return context


def _clipped(accelerator: Accelerator, policy: Policy, limit: float) -> torch.Tensor:
    """The norm of all gradients before they were clipped."""
    return torch.as_tensor(accelerator.clip_grad_norm_(policy.parameters(), limit))


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
