"""The policy: one `nn.Module`, through whose `forward` alone gradients flow, and which also samples."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from rllava_core.policy.adapter import ModelAdapter
from rllava_core.policy.batch import PolicyBatch
from rllava_core.policy.logprobs import at_least_float32, chunked_logprobs, log_softmax_of


@dataclass(frozen=True)
class PolicyOutput:
    """What an algorithm sees of the policy, for the D decisions of a batch.

    logprobs: [D] log-prob of each decision.
    entropies: [D] entropy (nats) of the distribution that each decision was drawn from.
    heads: [D, size] outputs of the heads that the algorithm declared, in the state of each decision.
    """

    logprobs: Tensor
    entropies: Tensor
    heads: Mapping[str, Tensor]


class Policy(nn.Module):
    """A vision-language model as a policy.

    heads: name and output size of further linear heads on the hidden state of a decision (a value, action values).
    temperature: of the softmax, while sampling and while training alike.
    """

    def __init__(
        self,
        adapter: ModelAdapter,
        model: PreTrainedModel,
        heads: Mapping[str, int] | None = None,
        temperature: float = 1.0,
    ) -> None:
        super().__init__()
        self.adapter = adapter
        self.model = model
        self.temperature = temperature
        hidden = model.config.get_text_config().hidden_size
        self.heads = nn.ModuleDict({name: nn.Linear(hidden, size) for name, size in (heads or {}).items()})
        forbidden = torch.zeros(_vocabulary(adapter, model), dtype=torch.bool)
        forbidden[list(adapter.forbidden_tokens)] = True
        self.forbidden: Tensor
        self.register_buffer("forbidden", forbidden, persistent=False)

    @property
    def device(self) -> torch.device:
        return self.forbidden.device

    def forward(self, batch: PolicyBatch) -> PolicyOutput:
        """Log-probs, entropies and heads of every decision of the batch."""
        states = self._states(batch)
        scored, entropies = self._score(batch, states)
        choices = _normalise_choices(batch, scored)
        decided = states[batch.decision_read]
        return PolicyOutput(
            logprobs=torch.cat([scored, choices.flatten()])[batch.decision_logprob],
            entropies=torch.cat([entropies, _entropy(choices)])[batch.decision_entropy],
            heads={name: at_least_float32(head(at_least_float32(decided))) for name, head in self.heads.items()},
        )

    def choice_logprobs(self, batch: PolicyBatch) -> Tensor:
        """[U, C] log-probs of all choices in each state with choices; -inf where a state has fewer."""
        scored, _ = self._score(batch, self._states(batch))
        return _normalise_choices(batch, scored)

    def prefill(self, batch: PolicyBatch) -> tuple[Tensor, DynamicCache]:
        """[P, H] hidden state at the end of each prefix, and the prefixes' key-value cache."""
        cache = DynamicCache(config=self.model.config)
        hidden = self.adapter.hidden_states(
            self.model,
            tokens=batch.prefix_tokens,
            attention_mask=batch.prefix_mask,
            positions=batch.prefix_positions,
            media=batch.prefix_media,
            cache=cache,
        )
        ends = batch.prefix_mask.sum(dim=1) - 1
        return hidden[torch.arange(len(ends), device=ends.device), ends], cache

    def next_token_logprobs(self, hidden: Tensor) -> Tensor:
        """[N, V] log-probs of the next token from [N, H] hidden states; forbidden tokens at -inf."""
        return log_softmax_of(hidden, self.adapter.lm_head(self.model), self.forbidden, self.temperature)

    def _states(self, batch: PolicyBatch) -> Tensor:
        """[R, H]: every prefix once, every branch once on top of the prefixes' cache; then the states that are read."""
        states, cache = self.prefill(batch)
        if batch.branch_prefix.numel():
            cache.batch_select_indices(batch.branch_prefix)
            branches = self.adapter.hidden_states(
                self.model,
                tokens=batch.branch_tokens,
                attention_mask=torch.cat([batch.prefix_mask[batch.branch_prefix], batch.branch_mask], dim=1),
                positions=batch.branch_positions,
                media=batch.branch_media,
                cache=cache,
            )
            states = torch.cat([states, branches.flatten(0, 1)])
        return states[batch.read_from]

    def _score(self, batch: PolicyBatch, states: Tensor) -> tuple[Tensor, Tensor]:
        head = self.adapter.lm_head(self.model)
        return chunked_logprobs(states, head, batch.scored_read, batch.scored_token, self.forbidden, self.temperature)


def _vocabulary(adapter: ModelAdapter, model: PreTrainedModel) -> int:
    weight = adapter.lm_head(model).weight
    assert isinstance(weight, Tensor)
    return int(weight.shape[0])


def _normalise_choices(batch: PolicyBatch, scored: Tensor) -> Tensor:
    """[U, C]: log-softmax over the choices of a state, each scored by the sum of its tokens' log-probs."""
    padding = batch.choice_tokens < 0
    if padding.numel() == 0:
        return scored.new_zeros(batch.choice_tokens.shape[:2])
    sums = scored[batch.choice_tokens.clamp(min=0)].masked_fill(padding, 0.0).sum(-1)
    return torch.log_softmax(sums.masked_fill(padding.all(-1), -torch.inf), dim=-1)


def _entropy(choices: Tensor) -> Tensor:
    return -(choices.exp() * choices.masked_fill(choices == -torch.inf, 0.0)).sum(-1)
