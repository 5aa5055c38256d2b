"""Log-probs and entropies from hidden states, in chunks: never the whole logits.

The language head is applied to a few positions at a time, and again in the backward pass, so memory is bounded by
chunk × vocabulary however many positions there are. With a vocabulary of 152,000 nothing of a step costs more than to
go over the logits, so for a head that is a plain linear layer the gradient is written out: a few passes in place, where
autograd would make a new tensor for every operation, and the gradient of the head added up where it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
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
    *,
    adds_up: bool = False,
) -> tuple[Tensor, Tensor]:
    """Log-probs [K] of tokens and entropies [R] (nats) of softmax(logits / temperature) over the allowed tokens.

    Float32 at least, whatever the model's precision. `row` must ascend, so that each chunk of hidden states owns one
    slice of the tokens.

    adds_up: `backward` follows, which adds to the gradients that are there: that of a linear head then grows where it
        is, and no second one is made beside it. Not for `torch.autograd.grad`, whose result would hold both.
    """
    size = max(1, chunk_elements // forbidden.numel())
    if not len(hidden):
        return at_least_float32(hidden.new_zeros(0)), at_least_float32(hidden.new_zeros(0))
    if type(lm_head) is nn.Linear:
        never = forbidden.nonzero()[:, 0]
        dtype = _product_type(hidden, lm_head.weight)
        # A tensor's own conversion, which autograd knows, and which autocast would make anew for every chunk.
        inputs = (hidden.to(dtype), lm_head.weight.to(dtype), None if lm_head.bias is None else lm_head.bias.to(dtype))
        found: tuple[Tensor, Tensor] = _LinearScores.apply(*inputs, row, token, never, temperature, size, adds_up)
        return found
    logprobs, entropies = [], []
    for part, own in _chunks(row, len(hidden), size):
        arguments = (hidden[part], lm_head, row[own] - part.start, token[own], forbidden, temperature)
        if torch.is_grad_enabled() and len(hidden) > size:
            chunk_logprobs, chunk_entropies = checkpoint(_score, *arguments, use_reentrant=False)
        else:
            chunk_logprobs, chunk_entropies = _score(*arguments)
        logprobs.append(chunk_logprobs)
        entropies.append(chunk_entropies)
    return torch.cat(logprobs), torch.cat(entropies)


def log_softmax_of(hidden: Tensor, lm_head: nn.Module, forbidden: Tensor, temperature: float) -> Tensor:
    """[N, V] log-probs of the next token, forbidden tokens at -inf. For sampling; N is a batch of sequences."""
    return torch.log_softmax(_logits(hidden, lm_head, forbidden, temperature), dim=-1)


def at_least_float32(values: Tensor) -> Tensor:
    """Half precision becomes float32; a model in float64 keeps it."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def _product_type(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """The type that their product is computed in here: autocast's, if it is on for their device, or the weight's."""
    with torch.no_grad():
        return functional.linear(hidden[:1].to(weight.dtype), weight[:1]).dtype


def _chunks(row: Tensor, count: int, size: int) -> Iterator[tuple[slice, slice]]:
    """Consecutive hidden states, and the scored tokens that are theirs."""
    starts = list(range(0, count, size))
    edges = torch.searchsorted(row, torch.tensor([*starts, count], device=row.device)).tolist()
    for start, begin, end in zip(starts, edges[:-1], edges[1:], strict=True):
        yield slice(start, min(start + size, count)), slice(begin, end)


class _LinearScores(torch.autograd.Function):
    """`chunked_logprobs` with a linear head, of `weight` [V, H] and `bias` [V] or None.

    Of z = (W·h + b) / temperature, p = softmax(z) and the entropy E of p, the gradients are
    ∂ log p(t) / ∂z = 1(t) − p and ∂E / ∂z = −p · (log p + E).
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        row: Tensor,
        token: Tensor,
        never: Tensor,
        temperature: float,
        size: int,
        adds_up: bool,
    ) -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        logprobs = hidden.new_empty(len(row), dtype=wide)
        entropies, totals = hidden.new_empty(2, len(hidden), dtype=wide)
        for part, own in _chunks(row, len(hidden), size):
            scores = _linear_scores(hidden[part], weight, bias, never, temperature)
            largest = scores.amax(dim=-1, keepdim=True)
            scores -= largest
            taken = scores[row[own] - part.start, token[own]]
            shares = scores.exp()
            sums = shares.sum(dim=-1)
            logs = sums.log()
            mean = torch.bmm(shares[:, None], scores[:, :, None])[:, 0, 0] / sums
            logprobs[own] = taken - logs[row[own] - part.start]
            entropies[part] = logs - mean
            totals[part] = largest[:, 0] + logs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(hidden, weight, bias, row, token, never, totals, entropies)
        ctx.temperature, ctx.size, ctx.adds_up = temperature, size, adds_up
        return logprobs, entropies

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, row, token, never, totals, entropies = ctx.saved_tensors
        of_logprobs, of_entropies = gradients
        if of_logprobs is None:
            of_logprobs = torch.zeros(len(row), dtype=totals.dtype, device=row.device)
        per_row = torch.zeros_like(totals).index_add_(0, row, of_logprobs)
        for_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for_weight = _begun(weight, ctx.adds_up) if ctx.needs_input_grad[1] else None
        for_bias = torch.zeros_like(bias) if bias is not None and ctx.needs_input_grad[2] else None
        for part, own in _chunks(row, len(hidden), ctx.size):
            scores = _linear_scores(hidden[part], weight, bias, never, ctx.temperature)
            scores -= totals[part, None]
            if of_entropies is None:
                change = scores.exp_().mul_(-per_row[part, None])
            else:
                change = scores.exp()
                scores += entropies[part, None]
                scores *= of_entropies[part, None]
                scores += per_row[part, None]
                change.mul_(scores).neg_()
            change.index_put_((row[own] - part.start, token[own]), of_logprobs[own], accumulate=True)
            if ctx.temperature != 1:
                change /= ctx.temperature
            change = change.to(weight.dtype)
            if for_hidden is not None:
                torch.mm(change, weight, out=for_hidden[part])
            if for_weight is not None:
                for_weight.addmm_(change.T, hidden[part])
            if for_bias is not None:
                for_bias += change.sum(dim=0)
        return for_hidden, for_weight, for_bias, None, None, None, None, None, None


def _begun(weight: Tensor, adds_up: bool) -> Tensor:
    """What the gradient of a weight is added to: zeros, or the one of the backward passes before, taken off the weight,
    which gets it back as a whole."""
    if not adds_up or not weight.is_leaf or weight.grad is None:
        return torch.zeros_like(weight)
    gradient, weight.grad = weight.grad, None
    return gradient


_NEVER = -1e30
"""For what is forbidden: no share of any softmax, and unlike an infinity 0 if it is multiplied by that."""


def _linear_scores(hidden: Tensor, weight: Tensor, bias: Tensor | None, never: Tensor, temperature: float) -> Tensor:
    """[r, V] logits over the temperature, float32 at least, to be changed in place."""
    logits = torch.mm(hidden, weight.T)
    if bias is not None:
        logits += bias
    scores = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if temperature != 1:
        scores /= temperature
    return scores.index_fill_(1, never, _NEVER)


def _logits(hidden: Tensor, lm_head: nn.Module, forbidden: Tensor, temperature: float) -> Tensor:
    logits = at_least_float32(lm_head(hidden))
    # A pass over all logits is worth sparing.
    return (logits if temperature == 1 else logits / temperature).masked_fill(forbidden, -torch.inf)


def _score(
    hidden: Tensor, lm_head: nn.Module, row: Tensor, token: Tensor, forbidden: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    logprobs = torch.log_softmax(_logits(hidden, lm_head, forbidden, temperature), dim=-1)  # [r, V]
    # 0 · (-inf) would be NaN; a forbidden token adds nothing to the entropy.
    entropies = -(logprobs.exp() * logprobs.masked_fill(forbidden, 0.0)).sum(-1)
    return logprobs[row, token], entropies
