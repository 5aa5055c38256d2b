"""The learning rate as a function of the step, so that a resumed run has nothing to restore."""

from __future__ import annotations

import math

from rllava_core.config import TrainingSection


def learning_rate(training: TrainingSection, step: int) -> float:
    """Learning rate of step number `step` (from 0): a linear warm-up, then constant, or linear or cosine to zero."""
    peak, warmup = training.learning_rate, training.warmup_steps
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, training.steps - warmup)
    if training.schedule == "linear":
        return peak * (1 - progress)
    if training.schedule == "cosine":
        return peak * (1 + math.cos(math.pi * progress)) / 2
    return peak
