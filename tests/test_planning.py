"""The parts of a plan against numbers worked out by hand."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from rllava_core.cli.plan import parse_size
from rllava_core.errors import ConfigError
from rllava_core.planning.counting import optimizer_bytes, step_bytes
from rllava_core.planning.request import Levers
from rllava_core.planning.tracing import Tracer, backward


def meta(*shape: int, dtype: torch.dtype = torch.float32, trained: bool = False) -> Any:
    return torch.empty(shape, device="meta", dtype=dtype, requires_grad=trained)


def test_the_peak_is_where_most_is_held() -> None:
    """[1000, 1000] float32 are 4 MB: two at once, then one."""
    values = meta(1000, 1000)
    with Tracer(vocabulary=7) as tracer:
        double = values * 2
        more = double + 1
        del double
        first = tracer.stage()
        more.add_(1)
        more.view(-1)
        second = tracer.stage()

    assert first.peak == {"activations": 8_000_000}
    assert first.left == {"activations": 4_000_000}
    assert second.peak == {"activations": 4_000_000}


def test_operations_and_logits_are_counted() -> None:
    hidden, head = meta(30, 16), meta(7, 16)
    for _ in range(2):  # the second time from what was remembered
        with Tracer(vocabulary=7) as tracer:
            logits = functional.linear(hidden, head)
        assert tracer.footprint.peak == {"logits": 30 * 7 * 4}
        assert tracer.footprint.flops == 2 * 30 * 7 * 16
        del logits


def test_attention_keeps_no_scores_and_layers_can_be_computed_again() -> None:
    query, key, value = (meta(1, 2, 500, 8, trained=True) for _ in range(3))
    with Tracer(vocabulary=7) as tracer:
        attended = checkpoint(functional.scaled_dot_product_attention, query, key, value, use_reentrant=False)
        backward(attended.sum())

    assert query.grad.shape == query.shape
    # Scores would be 2 · 500 · 500 numbers.
    assert tracer.footprint.total < 2 * 500 * 500 * 4


def test_offloaded_activations_are_on_the_host_until_they_are_needed() -> None:
    weight = meta(1000, 1000, trained=True)
    values = meta(1000, 1000)
    kept = weight.untyped_storage()._cdata
    with Tracer(vocabulary=7) as tracer, tracer.offloading(lambda saved: saved.untyped_storage()._cdata == kept):
        loss = (torch.relu(values @ weight) ** 2).sum()
        left = tracer.stage().left
        backward(loss)

    # The product, the input of the product, and the rectified product, of which autograd saves two twice.
    assert left == {"activations": 4}
    assert tracer.footprint.host >= 3 * 4_000_000


def test_whole_numbers_stay_real() -> None:
    table = meta(10, 4)
    with Tracer(vocabulary=7):
        counted = torch.arange(5, device=table.device)
        mask = torch.tensor([True, False, True, False, False])
        rows = functional.embedding(counted, table)

        assert counted.tolist() == [0, 1, 2, 3, 4]
        assert rows[mask].shape == (2, 4)


def test_mixed_precision() -> None:
    weight, values = meta(8, 16, trained=True), meta(4, 16)
    with Tracer(vocabulary=7, autocast=torch.bfloat16):
        product = functional.linear(values, weight)
        assert product.dtype == torch.bfloat16
        assert (product.float() + 1).dtype == torch.float32
        backward(product.float().sum())

    assert weight.grad.dtype == torch.float32


def test_mixed_precision_keeps_one_copy_of_a_weight_however_often_it_is_used() -> None:
    weight, values = meta(8, 16, trained=True), meta(4, 16)
    with torch.no_grad(), Tracer(vocabulary=7, autocast=torch.bfloat16) as tracer:
        for _ in range(3):
            functional.linear(values, weight)
        assert tracer.footprint.left == {"lowered": 8 * 16 * 2}
        tracer.leave_autocast()
        functional.linear(values, weight)

    assert not +Counter(tracer.footprint.left)


@pytest.mark.parametrize(
    ("levers", "dtype", "expected"),
    [
        (Levers(), torch.float32, 8 * 1_000_000),
        (Levers(), torch.bfloat16, 4 * 1_000_000),
        (Levers(optimizer="adamw_8bit"), torch.bfloat16, 2 * 1_000_000 + 2 * 15_625),
        (Levers(optimizer="adafactor"), torch.bfloat16, 4 * 2000),
        (Levers(optimizer_on_cpu=True), torch.bfloat16, 12 * 1_000_000),
        (Levers(optimizer_on_cpu=True), torch.float32, 8 * 1_000_000),
        (Levers(optimizer_on_cpu=True, stochastic_rounding=True), torch.bfloat16, 8 * 1_000_000),
        (Levers(stochastic_rounding=True), torch.bfloat16, 8 * 1_000_000),
    ],
)
def test_states_of_optimizers(levers: Levers, dtype: torch.dtype, expected: int) -> None:
    assert optimizer_bytes(levers, [meta(1000, 1000, dtype=dtype)]) == expected


@pytest.mark.parametrize(
    ("levers", "dtype", "on_card", "expected"),
    [
        (Levers(), torch.float32, False, 0),
        (Levers(optimizer="adafactor"), torch.float32, False, 8),
        (Levers(optimizer="adamw_8bit"), torch.float32, True, 0),
        (Levers(optimizer_on_cpu=True), torch.float32, False, 0),
        (Levers(optimizer_on_cpu=True), torch.float32, True, 4),  # the weight
        (Levers(optimizer_on_cpu=True), torch.bfloat16, False, 4),  # the gradient; there is a master
        (Levers(optimizer_on_cpu=True, stochastic_rounding=True), torch.bfloat16, True, 8),
        (Levers(stochastic_rounding=True), torch.bfloat16, False, 8),
        (Levers(optimizer="adamw_8bit", optimizer_on_cpu=True), torch.float32, False, 24),
        (Levers(optimizer="adamw_8bit", optimizer_on_cpu=True), torch.bfloat16, False, 28),
    ],
)
def test_what_a_step_takes_for_the_while(levers: Levers, dtype: torch.dtype, on_card: bool, expected: int) -> None:
    trained = [meta(1000, dtype=dtype), meta(10, dtype=dtype)]
    assert step_bytes(levers, trained, on_card=on_card) == 1000 * expected


def test_levers_as_overrides() -> None:
    before = Levers()
    after = Levers(dtype="bfloat16", micro_batch_tokens=4096, optimizer_on_cpu=True, max_sequences=8)

    assert after.overrides(before) == [
        "model.dtype=bfloat16",
        "training.micro_batch_tokens=4096",
        "engine.rollout.max_sequences=8",
        "engine.train.optimizer_on_cpu=true",
    ]


@pytest.mark.parametrize(
    ("text", "size"),
    [("24GB", 24 * 2**30), ("24 GiB", 24 * 2**30), ("1.5g", 3 * 2**29), ("512MB", 2**29), ("1024", 1024)],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text, "--fit") == size


@pytest.mark.parametrize("text", ["24XB", "", "GB", "-1GB", "0", "24 G B", "1e3GB"])
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(ConfigError, match="expected a size such as 24GB"):
        parse_size(text, "--fit")
