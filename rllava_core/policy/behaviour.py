"""How a policy acts while it samples: by its own distribution, or by the values that a head gives to the choices."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

ActionValues = Callable[[Mapping[str, Tensor]], Tensor]
"""From the outputs of the heads in N states, [N, size] each, to [N, C] values of the choices."""


@dataclass(frozen=True)
class Behaviour:
    """How actions are chosen.

    action_values: the choice of the greatest value is taken; None: actions are drawn from the policy's distribution.
    epsilon: probability of drawing uniformly among the choices instead.

    Where an evaluation asks for greedy actions, epsilon is taken as 0.
    """

    action_values: ActionValues | None = None
    epsilon: float = 0.0

    @property
    def is_policy(self) -> bool:
        """Whether the recorded log-probs are those of the policy itself, so that they can be compared with it."""
        return self.action_values is None and self.epsilon == 0.0
