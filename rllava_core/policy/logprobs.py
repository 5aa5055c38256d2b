"""Log-probs and entropies from hidden states, in chunks: never the whole logits.

The language head is applied to a few positions at a time, and again in the backward pass (activation checkpointing),
so memory is bounded by chunk × vocabulary however many positions there are.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

CHUNK_ELEMENTS = 2**24
"""Logits held at once: 64 MiB of float32."""


def chunked_logprobs(
    hidden: Tensor,  # [R, H]
    lm_head: nn.Module,
    row: Tensor,  # [K], ascending: which hidden state scores each token
    token: Tensor,  # [K]
    forbidden: Tensor,  # [V] bool
    temperature: float,
    chunk_elements: int = CHUNK_ELEMENTS,
) -> tuple[Tensor, Tensor]:
    """Log-probs [K] of tokens and entropies [R] (nats) of softmax(logits / temperature) over the allowed tokens.

    Float32 at least, whatever the model's precision. `row` must ascend, so that each chunk of hidden states owns one
    slice of the tokens.
    """
    vocabulary = forbidden.numel()
    size = max(1, chunk_elements // vocabulary)
    logprobs, entropies = [], []
    starts = list(range(0, hidden.shape[0], size))
    edges = torch.searchsorted(row, torch.tensor([*starts, hidden.shape[0]], device=row.device)).tolist()
    for index, start in enumerate(starts):
        chunk = hidden[start : start + size]
        own = slice(edges[index], edges[index + 1])
        arguments = (chunk, lm_head, row[own] - start, token[own], forbidden, temperature)
        if torch.is_grad_enabled() and len(starts) > 1:
            chunk_logprobs, chunk_entropies = checkpoint(_score, *arguments, use_reentrant=False)
        else:
            chunk_logprobs, chunk_entropies = _score(*arguments)
        logprobs.append(chunk_logprobs)
        entropies.append(chunk_entropies)
    if not starts:
        return at_least_float32(hidden.new_zeros(0)), at_least_float32(hidden.new_zeros(0))
    return torch.cat(logprobs), torch.cat(entropies)


def log_softmax_of(hidden: Tensor, lm_head: nn.Module, forbidden: Tensor, temperature: float) -> Tensor:
    """[N, V] log-probs of the next token, forbidden tokens at -inf. For sampling; N is a batch of sequences."""
    return torch.log_softmax(_logits(hidden, lm_head, forbidden, temperature), dim=-1)


def at_least_float32(values: Tensor) -> Tensor:
    """Half precision becomes float32; a model in float64 keeps it."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def _logits(hidden: Tensor, lm_head: nn.Module, forbidden: Tensor, temperature: float) -> Tensor:
    logits = at_least_float32(lm_head(hidden))
    return (logits / temperature).masked_fill(forbidden, -torch.inf)


def _score(
    hidden: Tensor, lm_head: nn.Module, row: Tensor, token: Tensor, forbidden: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    logprobs = torch.log_softmax(_logits(hidden, lm_head, forbidden, temperature), dim=-1)  # [r, V]
    # 0 · (-inf) would be NaN; a forbidden token adds nothing to the entropy.
    entropies = -(logprobs.exp() * logprobs.masked_fill(forbidden, 0.0)).sum(-1)
    return logprobs[row, token], entropies
