"""The policy: one `nn.Module`, through whose `forward` alone gradients flow, and which also samples."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from rllava_core.errors import TrainingError
from rllava_core.policy.adapter import ModelAdapter
from rllava_core.policy.batch import PolicyBatch
from rllava_core.policy.logprobs import at_least_float32, chunked_logprobs, log_softmax_of
from rllava_core.policy.memory import Memory, give_back, growing_cache, selected
from rllava_core.policy.recompute import Recomputed
from rllava_core.policy.trained import is_adapted, load_part_state, part_state, trained_names


@dataclass(frozen=True)
class Head:
    """A further linear output of the policy, in the state of each decision.

    size: how many numbers; `choices`: as many as the environment offers choices.
    own_trunk: read the states of a second model, at first equal to the policy's and trained beside it (a separate
        critic), not those of the policy itself. All such heads share one.
    """

    size: int | Literal["choices"]
    own_trunk: bool = False


@dataclass(frozen=True)
class PolicyOutput:
    """What an algorithm sees of the policy, for the D decisions of the N trajectories of a batch.

    logprobs: [D] log-prob of each decision.
    entropies: [D] entropy (nats) of the distribution that each decision was drawn from.
    heads: [D, size] outputs of the heads that the algorithm declared, in the state of each decision.
    final: [N, size] their outputs in the state that each truncated trajectory was left in, zeros for the others; only
        where the policy is evaluated, not in the output that a loss is given.
    """

    logprobs: Tensor
    entropies: Tensor
    heads: Mapping[str, Tensor]
    final: Mapping[str, Tensor] = field(default_factory=dict)


class Policy(nn.Module):
    """A vision-language model as a policy.

    heads: further linear outputs in the state of a decision (a value, action values), by name.
    temperature: of the softmax, while sampling and while training alike.
    trunk: a second model for the heads that do not read the policy's own states; needed if there are any.

    Raises TrainingError for a head whose size is not known.
    """

    def __init__(
        self,
        adapter: ModelAdapter,
        model: PreTrainedModel,
        heads: Mapping[str, Head] | None = None,
        temperature: float = 1.0,
        trunk: PreTrainedModel | None = None,
    ) -> None:
        super().__init__()
        self.adapter = adapter
        self.model = model
        self.temperature = temperature
        self.separate = frozenset(name for name, head in (heads or {}).items() if head.own_trunk)
        self.trunk = trunk if self.separate else None
        if self.separate and trunk is None:
            raise TrainingError(f"head {min(self.separate)!r} reads a trunk of its own, and there is none")
        hidden = model.config.get_text_config().hidden_size
        self.heads = nn.ModuleDict({name: nn.Linear(hidden, _size(name, head)) for name, head in (heads or {}).items()})
        forbidden = torch.zeros(_vocabulary(adapter, model), dtype=torch.bool)
        forbidden[list(adapter.forbidden_tokens)] = True
        self._recomputed: Recomputed | None = None
        self.forbidden: Tensor
        self.register_buffer("forbidden", forbidden, persistent=False)

    def copied(self) -> Policy:
        """A policy of its own that shares the adapter, and the very tensors of what is not trained."""
        shared = {id(item): item for item in self.parameters() if not item.requires_grad}
        return copy.deepcopy(self, memo={**shared, id(self.adapter): self.adapter})

    def recompute(self, wanted: bool) -> None:
        """Whether passes with gradients over packed batches keep the inputs of layers only, and compute the rest again.

        Raises ConfigError for a model whose layers cannot.
        """
        self._recomputed = Recomputed([self.model, *([] if self.trunk is None else [self.trunk])]) if wanted else None

    @property
    def recomputes(self) -> bool:
        """Whether packed batches spare memory."""
        return self._recomputed is not None

    @property
    def device(self) -> torch.device:
        return self.forbidden.device

    def forward(self, batch: PolicyBatch, *, adds_up: bool = False) -> PolicyOutput:
        """Log-probs, entropies and heads of every decision of the batch.

        adds_up: `backward` follows, and not `torch.autograd.grad` (see `chunked_logprobs`).
        """
        recomputed = self._recomputed if batch.packed and torch.is_grad_enabled() else None
        with recomputed or nullcontext():
            return self._output(batch, adds_up)

    def _output(self, batch: PolicyBatch, adds_up: bool) -> PolicyOutput:
        states = self._states(self.model, batch)
        scored, entropies = self._score(batch, states, adds_up)
        choices = _normalise_choices(batch, scored)
        trunk_states = states if self.trunk is None else self._states(self.trunk, batch)
        read = {name: trunk_states if name in self.separate else states for name in self.heads}
        return PolicyOutput(
            logprobs=torch.cat([scored, choices.flatten()])[batch.decision_logprob],
            entropies=torch.cat([entropies, _entropy(choices)])[batch.decision_entropy],
            heads={name: self._head(name, values[batch.decision_read]) for name, values in read.items()},
        )

    def prefill(self, batch: PolicyBatch, memory: Memory | None = None) -> Memory:
        """Read the prefixes of a batch, which begin conversations or continue rows of a memory. For sampling: without
        gradients.

        The memory given is left as it is.
        """
        if memory is None:
            return self._prefill(self.model, batch, growing_cache(self.model.config), batch.prefix_mask)
        cache = selected(memory.cache, batch.prefix_seen, len(memory.mask))
        mask = torch.cat([memory.mask[batch.prefix_seen], batch.prefix_mask], dim=1)
        return self._prefill(self.model, batch, cache, mask)

    def choice_logprobs(self, batch: PolicyBatch, memory: Memory) -> Tensor:
        """[U, C] log-probs of all choices in each state with choices; -inf where a state has fewer.

        memory: what `prefill` made of the same batch.
        """
        scored, _ = self._score(batch, self._continue(self.model, batch, memory))
        return _normalise_choices(batch, scored)

    def context_heads(self, batch: PolicyBatch) -> dict[str, Tensor]:
        """Outputs of all heads at the end of each prefix of a batch, [P, size] each."""
        last = self._read(self.model, batch).last
        trunk_last = last if self.trunk is None else self._read(self.trunk, batch).last
        return {name: self._head(name, trunk_last if name in self.separate else last) for name in self.heads}

    def next_token_logprobs(self, hidden: Tensor) -> Tensor:
        """[N, V] log-probs of the next token from [N, H] hidden states; forbidden tokens at -inf."""
        return log_softmax_of(hidden, self.adapter.lm_head(self.model), self.forbidden, self.temperature)

    def head_outputs(self, hidden: Tensor) -> dict[str, Tensor]:
        """Outputs of the heads that read the policy's own states, [N, size] each, from [N, H] hidden states."""
        return {name: self._head(name, hidden) for name in self.heads if name not in self.separate}

    def extra_state(self) -> dict[str, dict[str, Tensor]]:
        """The weights that a checkpoint of the model does not hold: heads, what is trained of their trunk if they have
        one, and of a model with low-rank adapters, which are merged in its checkpoint, what is trained of it."""
        state = {"heads": self.heads.state_dict(), "trunk": {}, "adapted": {}}
        if self.trunk is not None:
            state["trunk"] = part_state(self.trunk, trained_names(self.trunk))
        if is_adapted(self.model):
            state["adapted"] = part_state(self.model, trained_names(self.model))
        return state

    def load_extra_state(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Restore what `extra_state` returned. A model without adapters is taken to have them merged."""
        self.heads.load_state_dict(state["heads"])
        if self.trunk is not None:
            load_part_state(self.trunk, trained_names(self.trunk), state["trunk"])
        if is_adapted(self.model):
            load_part_state(self.model, trained_names(self.model), state["adapted"])

    def _head(self, name: str, states: Tensor) -> Tensor:
        return at_least_float32(self.heads[name](at_least_float32(states)))

    def _states(self, model: PreTrainedModel, batch: PolicyBatch) -> Tensor:
        """[R, H]: every prefix and every tree once; then the states that are read."""
        return self._continue(model, batch, None if batch.packed else self._read(model, batch))

    def _read(self, model: PreTrainedModel, batch: PolicyBatch) -> Memory:
        """Of the prefixes, with a cache that gradients flow through."""
        return self._prefill(model, batch, DynamicCache(config=model.config), batch.prefix_mask)

    def _prefill(self, model: PreTrainedModel, batch: PolicyBatch, cache: DynamicCache, mask: Tensor) -> Memory:
        hidden = self.adapter.hidden_states(
            model,
            tokens=batch.prefix_tokens,
            attention_mask=mask,
            positions=batch.prefix_positions,
            media=batch.prefix_media,
            cache=cache,
        )
        ends = batch.prefix_mask.sum(dim=1) - 1
        last = hidden[torch.arange(len(ends), device=ends.device), ends]
        return Memory(last, cache, mask, batch.next_position)

    def _continue(self, model: PreTrainedModel, batch: PolicyBatch, memory: Memory | None) -> Tensor:
        """[R, H]: trees, on top of the prefixes' cache if there is one; then the states that are read."""
        states = [] if memory is None else [memory.last]
        if len(batch.tree_tokens):
            before, cache = batch.tree_mask[:, :0], None
            if memory is not None:
                before = memory.mask[batch.tree_prefix]
                cache = selected(memory.cache, batch.tree_prefix, len(memory.mask))
            trees = self.adapter.hidden_states(
                model,
                tokens=batch.tree_tokens,
                attention_mask=_tree_mask(batch, before, model.dtype),
                positions=batch.tree_positions,
                media=batch.tree_media,
                cache=cache,
            )
            if cache is not None:
                give_back(cache, batch.tree_tokens.shape[1])
            states.append(trees.flatten(0, 1))
        return torch.cat(states)[batch.read_from]

    def _score(self, batch: PolicyBatch, states: Tensor, adds_up: bool = False) -> tuple[Tensor, Tensor]:
        head, read, token = self.adapter.lm_head(self.model), batch.scored_read, batch.scored_token
        return chunked_logprobs(states, head, read, token, self.forbidden, self.temperature, adds_up=adds_up)


def _tree_mask(batch: PolicyBatch, before: Tensor, dtype: torch.dtype) -> Tensor:
    """[B, S + T], or where trees have several branches [B, 1, T, S + T] to be added to the attention's scores.

    before: [B, S] which entries of the cache are their prefixes'.
    """
    if batch.tree_sees is None:
        return torch.cat([before, batch.tree_mask], dim=1)
    of_prefix = before.bool()[:, None].expand(-1, batch.tree_sees.shape[1], -1)
    sees = torch.cat([of_prefix, batch.tree_sees], dim=2)[:, None]
    return torch.zeros(sees.shape, dtype=dtype, device=sees.device).masked_fill_(~sees, torch.finfo(dtype).min)


def _size(name: str, head: Head) -> int:
    if head.size == "choices":
        raise TrainingError(f"head {name!r} has one output a choice, and nobody has said how many choices there are")
    return head.size


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
