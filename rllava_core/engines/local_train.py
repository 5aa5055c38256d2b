"""Training in this process, on accelerate: device, mixed precision, micro-batches, clipping, AdamW."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator

from rllava_core.algorithms.protocol import Batch, LossFunction
from rllava_core.engines.config import LocalTrainConfig
from rllava_core.engines.protocol import TrainSetup
from rllava_core.errors import ConfigError, TrainingError
from rllava_core.mdp.trajectory import Trajectory
from rllava_core.policy.batch import BatchBuilder, PolicyBatch
from rllava_core.policy.policy import Policy, PolicyOutput


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
            self.policy.parameters(),
            lr=setup.training.learning_rate,
            betas=setup.training.adam_betas,
            weight_decay=setup.training.weight_decay,
            fused=True,
        )
        self._wrapped, self._optimizer = self._accelerator.prepare(self.policy, optimizer)
        # Dropout would make the log-probs of sampling and training differ.
        self.policy.eval()
        self._reference = setup.reference
        if self._reference is not None:
            self._reference.to(self._accelerator.device).eval().requires_grad_(False)

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

    def evaluate(self, trajectories: Sequence[Trajectory]) -> PolicyOutput:
        return self._evaluate(self.policy, trajectories)

    def evaluate_reference(self, trajectories: Sequence[Trajectory]) -> PolicyOutput:
        assert self._reference is not None, "the algorithm did not declare uses_reference"
        return self._evaluate(self._reference, trajectories)

    def autocast(self) -> AbstractContextManager[Any]:
        context: AbstractContextManager[Any] = self._accelerator.autocast()
        return context

    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = self._optimizer.state_dict()
        return {"optimizer": state}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._optimizer.load_state_dict(state["optimizer"])

    def _pack(self, trajectories: Sequence[Trajectory]) -> PolicyBatch:
        builder = BatchBuilder(self.policy.adapter, self._media)
        for trajectory in trajectories:
            builder.add_trajectory(trajectory)
        return builder.build().to(self.policy.device)

    def _without_reduction(self, postponed: bool) -> AbstractContextManager[Any]:
        """Gradients of all micro-batches but the last stay on their process."""
        context: AbstractContextManager[Any] = self._accelerator.no_sync(self._wrapped) if postponed else nullcontext()
        return context

    @torch.no_grad()
    def _evaluate(self, policy: Policy, trajectories: Sequence[Trajectory]) -> PolicyOutput:
        outputs = []
        with self.autocast():
            for micro in Batch(tuple(trajectories), {}).split(self._training.micro_batch_tokens):
                outputs.append(policy(self._pack(micro.trajectories)))
        return PolicyOutput(
            logprobs=torch.cat([output.logprobs for output in outputs]).float().cpu(),
            entropies=torch.cat([output.entropies for output in outputs]).float().cpu(),
            heads={
                name: torch.cat([output.heads[name] for output in outputs]).float().cpu() for name in outputs[0].heads
            },
        )


def _describe(batch: Batch) -> str:
    names = list(dict.fromkeys(trajectory.name for trajectory in batch.trajectories))
    shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
    returns = [trajectory.episode_return for trajectory in batch.trajectories]
    return (
        f"{len(batch.trajectories)} trajectories of {shown} "
        f"(returns {min(returns):.4g} to {max(returns):.4g}, {sum(t.decisions for t in batch.trajectories)} decisions)"
    )
