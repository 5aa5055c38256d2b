"""Training in this process, on accelerate: device, mixed precision, micro-batches, clipping, AdamW."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator

from rllava_core.algorithms.protocol import Batch, LossFunction
from rllava_core.engines.config import LocalTrainConfig
from rllava_core.engines.protocol import TrainSetup
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
        optimizer = torch.optim.AdamW(
            [parameter for parameter in self.policy.parameters() if parameter.requires_grad],
            lr=setup.training.learning_rate,
            betas=setup.training.adam_betas,
            weight_decay=setup.training.weight_decay,
            fused=True,
        )
        self._wrapped, self._optimizer = self._accelerator.prepare(self.policy, optimizer)
        # Dropout would make the log-probs of sampling and training differ.
        self.policy.eval()
        self._copies = dict(setup.copies)
        self._updated: set[str] = set()
        for copy in self._copies.values():
            copy.to(self._accelerator.device).eval().requires_grad_(False)

    def step(self, batch: Batch, loss: LossFunction, learning_rate: float) -> dict[str, float]:
        metrics: dict[str, float] = defaultdict(float)
        micro_batches = list(batch.split(self._training.micro_batch_tokens))
        self._optimizer.zero_grad()
        for number, micro in enumerate(micro_batches):
            with self._without_reduction(number < len(micro_batches) - 1):
                result = loss(micro.to(self.policy.device), self._wrapped(self._pack(micro.trajectories)))
                if not torch.isfinite(result.total):
                    raise TrainingError(f"the loss became {result.total.item()} on {_describe(micro)}")
                self._accelerator.backward(result.total)
            for name, value in result.metrics.items():
                metrics[name] += float(value)
        limit = self._training.max_grad_norm
        norm = self._accelerator.clip_grad_norm_(self.policy.parameters(), float("inf") if limit is None else limit)
        if norm is None or not torch.isfinite(norm):
            raise TrainingError(f"the gradient became non-finite on {_describe(batch)}")
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        self._optimizer.step()
        return {**metrics, "policy/grad_norm": float(norm), "policy/learning_rate": learning_rate}

    def evaluate(self, trajectories: Sequence[Trajectory], copy: str | None = None) -> PolicyOutput:
        policy = self.policy if copy is None else self._copy(copy)
        with torch.no_grad(), self.autocast():
            # Packed as for a step, so that on unchanged weights a step finds the very same numbers.
            micro_batches = Batch(tuple(trajectories), {}).split(self._training.micro_batch_tokens)
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
        return {"optimizer": self._optimizer.state_dict(), "copies": copies}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._optimizer.load_state_dict(state["optimizer"])
        for name, weights in state["copies"].items():
            load_part_state(self._copy(name), trained_names(self.policy), weights)
            self._updated.add(name)

    def _copy(self, name: str) -> Policy:
        if name not in self._copies:
            kept = ", ".join(self._copies) or "none"
            raise TrainingError(f"there is no copy {name!r} of the policy; the algorithm's `copies` are: {kept}")
        return self._copies[name]

    def _pack(self, trajectories: Sequence[Trajectory]) -> PolicyBatch:
        builder = BatchBuilder(self.policy.adapter, self._media)
        for trajectory in trajectories:
            builder.add_trajectory(trajectory)
        return builder.build().to(self.policy.device)

    def _without_reduction(self, postponed: bool) -> AbstractContextManager[Any]:
        """Gradients of all micro-batches but the last stay on their process."""
        context: AbstractContextManager[Any] = self._accelerator.no_sync(self._wrapped) if postponed else nullcontext()
        return context


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
