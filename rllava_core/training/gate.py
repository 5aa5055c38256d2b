"""The parity gate: whether what acts is what is trained, before the first update and at every evaluation.

A rollout engine with weights of its own may sample from stale ones, from other pixels or by other kernels. Its log-
probs then differ from the trainer's, and a gradient would be of another policy than the one that acts.
"""

from __future__ import annotations

from collections.abc import Sequence

from rllava_core.config import TrainingSection
from rllava_core.engines.protocol import TrainEngine
from rllava_core.mdp.trajectory import Trajectory
from rllava_core.policy.adapter import ModelAdapter
from rllava_core.policy.checks import check_recomputed

COMPARED = 16
"""Episodes of an evaluation whose log-probs are computed again."""


def gate(
    trainer: TrainEngine, adapter: ModelAdapter, trajectories: Sequence[Trajectory], training: TrainingSection
) -> dict[str, float]:
    """Metrics of the gaps: `ratio`, the mean of exp|Δ log-prob|, `mean_gap` and `max_gap` in nats.

    Raises InvariantError, which names the worst decisions, beyond `training.max_logprob_gap` or `max_token_gap`.
    """
    chosen = trajectories[:COMPARED]
    logprobs = trainer.evaluate(chosen).logprobs
    gaps = check_recomputed(chosen, logprobs, adapter, training.max_logprob_gap, training.max_token_gap)
    return {"parity/ratio": gaps.ratio, "parity/mean_gap": gaps.mean, "parity/max_gap": gaps.largest}
