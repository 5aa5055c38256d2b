"""From gradients to weights: who holds the states of the optimizer, where, and when a step is taken.

A `WholeUpdate` is a torch optimizer, which steps when all gradients are there. A `StreamedUpdate` takes each gradient
as the backward pass makes it, so that an accelerator never holds all of them; it keeps what a step needs on the host,
or steps at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from rllava_core.config import TrainingSection
from rllava_core.engines.config import LocalTrainConfig
from rllava_core.errors import ConfigError, TrainingError


class Update(Protocol):
    """What follows the backward passes of a step."""

    def begin(self, backward_passes: int, learning_rate: float) -> None:
        """Forget the gradients of the step before."""
        ...

    def finish(self) -> Tensor:
        """Clip and step, unless a gradient is not finite. Returns the norm of all gradients before clipping."""
        ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


def optimizer_of(config: LocalTrainConfig, training: TrainingSection) -> Callable[[Sequence[nn.Parameter]], Optimizer]:
    """The optimizer that the config names, to be made for some parameters. Raises ConfigError if it is missing."""
    rate, decay = training.learning_rate, training.weight_decay
    if config.optimizer == "adamw":
        return lambda parameters: torch.optim.AdamW(
            parameters, lr=rate, betas=training.adam_betas, weight_decay=decay, fused=True
        )
    if config.optimizer == "adafactor":
        return lambda parameters: torch.optim.Adafactor(parameters, lr=rate, weight_decay=decay)
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise ConfigError(
            f"engine.train.optimizer is adamw_8bit, which needs bitsandbytes ({error}): pip install bitsandbytes"
        ) from None
    return lambda parameters: AdamW8bit(parameters, lr=rate, betas=training.adam_betas, weight_decay=decay)


class WholeUpdate:
    """A torch optimizer, and gradients that are all there before it steps.

    clip: given the largest norm, or none, clips the gradients and returns their norm.
    """

    def __init__(self, optimizer: Optimizer, clip: Callable[[float], Tensor], limit: float | None) -> None:
        self._optimizer = optimizer
        self._clip = clip
        self._limit = float("inf") if limit is None else limit

    def begin(self, backward_passes: int, learning_rate: float) -> None:
        self._optimizer.zero_grad()
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate

    def finish(self) -> Tensor:
        norm = self._clip(self._limit)
        if torch.isfinite(norm):
            self._optimizer.step()
        return norm

    def state_dict(self) -> dict[str, Any]:
        return {"optimizer": self._optimizer.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._optimizer.load_state_dict(state["optimizer"])


class StreamedUpdate:
    """An optimizer for each parameter, which is handed its gradient alone.

    on_cpu: gradients go to the host as they are made, and step there. Weights in half precision have a float32 master
        there, unless they are rounded stochastically.
    at_once: step as soon as a gradient is made. Then there is one backward pass a step, nothing can be clipped, and a
        gradient that is not finite leaves weights that have been stepped already.
    stochastic: round what a step makes of weights in half precision up or down at random, so that the mean is exact.
        Small steps, which rounding to the nearest would lose, then add up (arXiv:2010.06192).
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        make: Callable[[Sequence[nn.Parameter]], Optimizer],
        limit: float | None,
        *,
        on_cpu: bool,
        at_once: bool,
        stochastic: bool,
    ) -> None:
        self._limit = limit
        self._at_once = at_once
        self._backward_passes = 1
        self._rate = 0.0  # of this step
        self._squares: list[Tensor] = []
        self._slots = [_Slot(parameter, make, on_cpu=on_cpu, stochastic=stochastic) for parameter in parameters]
        for slot in self._slots:
            slot.parameter.register_post_accumulate_grad_hook(self._receiver(slot))

    def begin(self, backward_passes: int, learning_rate: float) -> None:
        if self._at_once and backward_passes > 1:
            raise ConfigError(
                f"engine.train.step_in_backward takes one backward pass a step, and this one has {backward_passes} "
                "micro-batches: raise training.micro_batch_tokens, or lower training.prompts_per_step"
            )
        self._rate = learning_rate
        self._squares = []
        for slot in self._slots:
            slot.gradient = slot.parameter.grad = None

    def finish(self) -> Tensor:
        if self._at_once:
            return torch.stack(self._squares).sum().sqrt()
        held = [slot for slot in self._slots if slot.gradient is not None]
        norm: Tensor = torch.linalg.vector_norm(torch.stack([slot.norm() for slot in held]))
        if torch.isfinite(norm):
            # As torch clips, which never scales up.
            scale = None if self._limit is None else (self._limit / (norm + 1e-6)).clamp(max=1.0)
            for slot in held:
                slot.step(self._rate, scale)
        return norm

    def state_dict(self) -> dict[str, Any]:
        return {"slots": [slot.state_dict() for slot in self._slots]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for slot, held in zip(self._slots, state["slots"], strict=True):
            slot.load_state_dict(held)

    def _receiver(self, slot: _Slot) -> Callable[[Tensor], None]:
        def receive(_: Tensor) -> None:
            slot.take()
            if not self._at_once or slot.gradient is None:
                return
            self._squares.append(slot.norm().square())
            if not torch.isfinite(self._squares[-1]):
                raise TrainingError("the gradient became non-finite in the backward pass, after steps had been taken")
            slot.step(self._rate, None)

        return receive


class _Slot:
    """A parameter, what its optimizer steps on in its place, and the gradient it has been handed."""

    def __init__(
        self,
        parameter: nn.Parameter,
        make: Callable[[Sequence[nn.Parameter]], Optimizer],
        *,
        on_cpu: bool,
        stochastic: bool,
    ) -> None:
        self.parameter = parameter
        self.gradient: Tensor | None = None
        self._device = torch.device("cpu") if on_cpu else parameter.device
        half = parameter.dtype in (torch.bfloat16, torch.float16)
        self._stochastic = stochastic and parameter.dtype == torch.bfloat16
        wide = torch.float32 if half and (on_cpu or self._stochastic) else parameter.dtype
        # Keeps the small steps, which rounding to the nearest would lose.
        mastered = half and on_cpu and not self._stochastic
        self._master = parameter.detach().to(self._device, wide, copy=True) if mastered else None
        self._stand_in = nn.Parameter(torch.empty(0, dtype=wide, device=self._device))
        self._optimizer = make([self._stand_in])

    def take(self) -> None:
        """The gradient that the backward pass has made; gradients of several passes add up."""
        gradient = self.parameter.grad
        self.parameter.grad = None
        if gradient is None:
            return
        if self.gradient is None:
            self.gradient = gradient.to(self._device)
        else:
            wide = self._stand_in.dtype
            self.gradient = self.gradient.to(wide).add_(gradient.to(self._device, wide))

    def norm(self) -> Tensor:
        """Of the gradient, in float32 at least."""
        assert self.gradient is not None
        wide = torch.promote_types(self.gradient.dtype, torch.float32)
        norm: Tensor = torch.linalg.vector_norm(self.gradient, dtype=wide)
        return norm

    @torch.no_grad()
    def step(self, learning_rate: float, scale: Tensor | None) -> None:
        assert self.gradient is not None
        stand_in = self._stand_in
        held = self.parameter if self._master is None else self._master
        stand_in.data = held.detach().to(self._device, stand_in.dtype)
        stand_in.grad = self.gradient.to(stand_in.dtype)
        if scale is not None:
            stand_in.grad *= scale
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        self._optimizer.step()
        if self._stochastic:
            for old, new in zip(_pieces(self.parameter), _pieces(stand_in.data), strict=True):
                old.copy_(stochastically_rounded(new))
        else:
            self.parameter.copy_(stand_in.data)
        self.gradient = stand_in.grad = None
        stand_in.data = torch.empty(0, dtype=stand_in.dtype, device=self._device)

    def state_dict(self) -> dict[str, Any]:
        # A torch optimizer's own, whose only parameter has the number 0.
        state = {"optimizer": self._optimizer.state_dict()}
        return state if self._master is None else {**state, "master": self._master}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._optimizer.load_state_dict(state["optimizer"])
        if self._master is not None:
            self._master.copy_(state["master"])


PIECE = 2**24
"""Weights rounded at once: the bits and the noise of a large embedding would take several times its own room."""


def _pieces(values: Tensor) -> Sequence[Tensor]:
    pieces: Sequence[Tensor] = values.detach().view(-1).split(PIECE)
    return pieces


def stochastically_rounded(values: Tensor) -> Tensor:
    """Float32 values in bfloat16: the neighbour above or below, with probabilities that make the mean exact.

    Draws from torch's global random state. Values that are not finite stay so.
    """
    # A bfloat16 is the upper half of a float32; what the lower half adds carries over with its own probability.
    bits = values.view(torch.int32)
    noise = torch.randint_like(bits, 0, 1 << 16)
    rounded = ((bits + noise) & -(1 << 16)).view(torch.float32)
    return torch.where(torch.isfinite(values), rounded, values).to(torch.bfloat16)
