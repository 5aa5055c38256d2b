"""Log-probs in chunks: the same numbers and gradients, and never the whole logits."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import rllava_core.policy.policy as policy_module
from rllava_core.mdp.trajectory import Trajectory
from rllava_core.policy.logprobs import chunked_logprobs, log_softmax_of
from rllava_core.testing.tiny import VOCABULARY

EXACT = {"rtol": 0.0, "atol": 1e-12}
STATES, HIDDEN, WORDS = 13, 8, 11
FORBIDDEN = torch.tensor([word in (2, 10) for word in range(WORDS)])
ROWS = torch.tensor([0, 0, 2, 3, 3, 3, 4, 5, 7, 9, 9, 12])  # some states score several tokens, some none
TOKENS = torch.tensor([1, 9, 4, 0, 0, 5, 6, 7, 8, 9, 1, 3])


def states() -> tuple[Tensor, nn.Linear]:
    torch.manual_seed(1)
    hidden = torch.randn(STATES, HIDDEN, dtype=torch.float64, requires_grad=True)
    return hidden, nn.Linear(HIDDEN, WORDS, dtype=torch.float64)


def by_hand(hidden: Tensor, head: nn.Linear, temperature: float) -> tuple[Tensor, Tensor]:
    """One state at a time, the allowed words only."""
    logprobs: dict[tuple[int, int], Tensor] = {}
    entropies = []
    for row, state in enumerate(hidden):
        scores = {
            word: ((head.weight[word] * state).sum() + head.bias[word]) / temperature
            for word in range(WORDS)
            if not FORBIDDEN[word]
        }
        total = sum(score.exp() for score in scores.values())
        entropies.append(-sum(score.exp() / total * (score - total.log()) for score in scores.values()))
        for word, score in scores.items():
            logprobs[row, word] = score - total.log()
    chosen = [logprobs[row, token] for row, token in zip(ROWS.tolist(), TOKENS.tolist(), strict=True)]
    return torch.stack(chosen), torch.stack(entropies)


HEADS = {"linear": lambda head: head, "of another kind": nn.Sequential}
"""The gradient of a plain linear layer is written out; that of any other module is left to autograd."""


# One state a chunk, a few, a number that leaves a rest, all but one, exactly all, more than all.
@pytest.mark.parametrize("chunk_elements", [1, 2 * WORDS, 5 * WORDS + 3, 12 * WORDS, 13 * WORDS, 10**6])
@pytest.mark.parametrize("temperature", [1.0, 0.4])
@pytest.mark.parametrize("kind", HEADS.values(), ids=HEADS)
def test_any_chunk_gives_the_numbers_and_gradients_of_a_loop(
    chunk_elements: int, temperature: float, kind: Any
) -> None:
    hidden, head = states()
    expected = by_hand(hidden, head, temperature)
    found = chunked_logprobs(hidden, kind(head), ROWS, TOKENS, FORBIDDEN, temperature, chunk_elements)

    weights = torch.linspace(-1, 2, len(ROWS), dtype=torch.float64), torch.linspace(3, -2, STATES, dtype=torch.float64)
    leaves = (hidden, head.weight, head.bias)
    for one, other in zip(expected, found, strict=True):
        torch.testing.assert_close(other, one, **EXACT)
    for one, other in zip(
        *(
            torch.autograd.grad(sum((w * part).sum() for w, part in zip(weights, parts, strict=True)), leaves)
            for parts in (expected, found)
        ),
        strict=True,
    ):
        torch.testing.assert_close(other, one, **EXACT)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("what", ["log-probs", "entropies", "both"])
def test_the_gradient_that_is_written_out_equals_finite_differences(what: str, bias: bool) -> None:
    hidden, head = states()
    leaves = [hidden, head.weight, head.bias][: 3 if bias else 2]

    def scored(hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
        made = nn.Linear(HIDDEN, WORDS, bias=bias is not None, dtype=torch.float64)
        del made.weight, made.bias
        made.weight, made.bias = weight, bias
        logprobs, entropies = chunked_logprobs(hidden, made, ROWS, TOKENS, FORBIDDEN, 0.7, 4 * WORDS)
        return {"log-probs": logprobs, "entropies": entropies, "both": (logprobs, entropies)}[what]

    assert torch.autograd.gradcheck(scored, leaves)


@pytest.mark.parametrize("frozen", ["head", "states"])
def test_only_what_is_asked_for_gets_a_gradient(frozen: str) -> None:
    hidden, head = states()
    expected, _ = by_hand(hidden, head, 1.0)
    whole = torch.autograd.grad(expected.sum(), (hidden, head.weight))
    (head if frozen == "head" else hidden).requires_grad_(False)
    chunked_logprobs(hidden, head, ROWS, TOKENS, FORBIDDEN, 1.0, 3 * WORDS)[0].sum().backward()
    if frozen == "head":
        torch.testing.assert_close(hidden.grad, whole[0], **EXACT)
    else:
        torch.testing.assert_close(head.weight.grad, whole[1], **EXACT)


@pytest.mark.parametrize("bias", [True, False])
def test_the_gradient_of_the_head_grows_where_it_is(bias: bool) -> None:
    hidden, head = states()
    if not bias:
        head.bias = None
    torch.manual_seed(2)
    head.weight.grad = torch.randn_like(head.weight)
    before, place = head.weight.grad.clone(), head.weight.grad.data_ptr()
    scored = partial(chunked_logprobs, hidden, head, ROWS, TOKENS, FORBIDDEN, 1.0, 3 * WORDS)
    own = torch.autograd.grad(scored()[0].sum(), head.weight)[0]
    for passes in (1, 2):
        scored(adds_up=True)[0].sum().backward()
        torch.testing.assert_close(head.weight.grad, before + passes * own, **EXACT)
        assert head.weight.grad.data_ptr() == place


def test_a_head_that_is_the_embedding_too_keeps_both_gradients() -> None:
    """The gradient of the head is made first, and that of the embedding added to what it returns."""
    table = nn.Embedding(WORDS, HIDDEN, dtype=torch.float64)
    head = nn.Linear(HIDDEN, WORDS, bias=False, dtype=torch.float64)
    head.weight = table.weight
    gradients = []
    for adds_up in (False, True):
        table.weight.grad = torch.ones_like(table.weight)
        states = table(torch.arange(STATES) % WORDS).sin()
        chunked_logprobs(states, head, ROWS, TOKENS, FORBIDDEN, 1.0, 3 * WORDS, adds_up=adds_up)[0].sum().backward()
        gradients.append(table.weight.grad)
    torch.testing.assert_close(gradients[1], gradients[0], **EXACT)


@pytest.mark.parametrize("dtype", [torch.bfloat16, "autocast"])
def test_half_precision_is_that_of_the_head_alone(dtype: Any) -> None:
    """Products are rounded to bfloat16, the softmax is not."""
    hidden, head = states()
    hidden, head = hidden.detach().float(), head.float()
    half = nn.Linear(HIDDEN, WORDS).bfloat16()
    half.load_state_dict(head.state_dict())
    logits = half(hidden.bfloat16()).float().masked_fill(FORBIDDEN, -torch.inf)
    expected = torch.log_softmax(logits, dim=-1)[ROWS, TOKENS]
    if dtype == "autocast":
        hidden.requires_grad_(True)
        with torch.autocast("cpu", torch.bfloat16):
            found, _ = chunked_logprobs(hidden, head, ROWS, TOKENS, FORBIDDEN, 1.0, 3 * WORDS)
        found.sum().backward()
        assert hidden.grad is not None
        assert hidden.grad.dtype == head.weight.grad.dtype == torch.float32
    else:
        found, _ = chunked_logprobs(hidden.bfloat16(), half, ROWS, TOKENS, FORBIDDEN, 1.0, 3 * WORDS)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=0, atol=0.02)


def test_without_gradients_chunks_give_the_same_numbers() -> None:
    hidden, head = states()
    with torch.no_grad():
        expected = by_hand(hidden, head, 0.7)
        found = chunked_logprobs(hidden, head, ROWS, TOKENS, FORBIDDEN, 0.7, 3 * WORDS)
    for one, other in zip(expected, found, strict=True):
        torch.testing.assert_close(other, one, **EXACT)


def test_no_states_give_no_numbers() -> None:
    _, head = states()
    nothing = torch.zeros(0, dtype=torch.long)
    logprobs, entropies = chunked_logprobs(torch.zeros(0, HIDDEN), head, nothing, nothing, FORBIDDEN, 1.0)
    assert logprobs.shape == entropies.shape == (0,)


def test_the_distribution_to_sample_from_is_the_one_that_is_trained() -> None:
    hidden, head = states()
    table = log_softmax_of(hidden, head, FORBIDDEN, 0.4)
    expected, entropies = by_hand(hidden, head, 0.4)

    torch.testing.assert_close(table[ROWS, TOKENS], expected, **EXACT)
    assert (table[:, FORBIDDEN] == -torch.inf).all()
    torch.testing.assert_close(table.exp().sum(-1), torch.ones(STATES, dtype=torch.float64), **EXACT)
    assert len(entropies) == STATES


class LargestLogits(TorchDispatchMode):
    """Remembers the largest tensor with the vocabulary as its last axis."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else [result]:
            if isinstance(value, Tensor) and value.ndim and value.shape[-1] == VOCABULARY:
                self.rows = max(self.rows, value.numel() // VOCABULARY)
        return result


@pytest.mark.parametrize("kind", HEADS.values(), ids=HEADS)
def test_no_more_logits_than_a_chunk_exist_at_any_time(
    toy: Any, mixed: list[Trajectory], monkeypatch: pytest.MonkeyPatch, kind: Any
) -> None:
    """Neither in the forward pass nor in the backward pass, where each chunk is computed again."""
    rows = 17  # unlike the number of rows of any weight, of which the head's gradient has the hidden size
    bounded = partial(chunked_logprobs, chunk_elements=rows * VOCABULARY)
    policy = toy.policy()
    batch = toy.pack(policy, mixed)
    expected = policy(batch)
    weight = policy.model.lm_head.weight
    expected_gradient = torch.autograd.grad(expected.logprobs.sum(), weight)[0]
    monkeypatch.setattr(policy_module, "chunked_logprobs", bounded)
    monkeypatch.setattr(policy.adapter, "lm_head", lambda model: kind(model.lm_head))

    with LargestLogits() as largest:
        output = policy(batch)
        gradient = torch.autograd.grad(output.logprobs.sum(), weight)[0]

    states = len(batch.read_from)
    assert states > 10 * rows
    assert largest.rows == rows
    torch.testing.assert_close(output.logprobs, expected.logprobs, **EXACT)
    torch.testing.assert_close(output.entropies, expected.entropies, **EXACT)
    torch.testing.assert_close(gradient, expected_gradient, rtol=0, atol=1e-10)
