"""Weights in pieces, and what vLLM reads of them."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError

from rllava_core.errors import ModelError
from rllava_core.testing.rollouts import tiny_policy
from rllava_vllm.receiving import Chunk
from rllava_vllm.weights import describe_model, dtype_of, encoded, pieces


def test_pieces_hold_everything_in_order_and_no_more_than_their_limit() -> None:
    weights = [(f"w{number}", torch.zeros(number)) for number in (3, 1, 2, 50, 4, 4)]
    found = list(pieces(iter(weights), 6 * 4))
    assert [[name for name, _ in piece] for piece in found] == [["w3", "w1", "w2"], ["w50"], ["w4"], ["w4"]]
    assert list(pieces(iter([]), 10)) == []


def test_pieces_are_made_when_they_are_asked_for() -> None:
    """So that merged adapters of one piece alone are held."""
    made = 0

    def weights() -> Any:
        nonlocal made
        for number in range(10):
            made += 1
            yield f"w{number}", torch.zeros(4)

    first = next(pieces(weights(), 16))
    assert len(first) == 1
    assert made == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_piece_survives_the_wire_bitwise(dtype: torch.dtype) -> None:
    piece = [("a", torch.randn(3, 4).to(dtype)), ("b.c", torch.randn(5, 6).to(dtype).T)]
    found = Chunk(safetensors=encoded(piece)).pairs()
    assert sorted(name for name, _ in found) == ["a", "b.c"]
    assert all(torch.equal(dict(piece)[name], values) for name, values in found)


def test_a_damaged_chunk_is_refused() -> None:
    with pytest.raises(SafetensorError):
        Chunk(safetensors=base64.b64encode(b"nothing of the kind").decode()).pairs()
    with pytest.raises(ValueError, match="either"):
        Chunk().pairs()


def test_a_model_is_described_without_its_weights(make_policy: Any, tmp_path: Path) -> None:
    policy = make_policy()
    describe_model(policy, tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert {"config.json", "tokenizer.json"} <= names
    assert not [name for name in names if "safetensors" in name]
    assert "Qwen2VLForConditionalGeneration" in (tmp_path / "config.json").read_text(encoding="utf-8")
    assert policy.model.config.architectures is None  # its own config is as it was
    assert dtype_of(policy) == "float32"


def test_a_model_that_is_none_of_transformers_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="TinyAdapter"):
        describe_model(tiny_policy(), tmp_path)
