"""For models from scratch: a tokenizer of bytes, which needs no file and can write any text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from transformers.convert_slow_tokenizer import bytes_to_unicode


def byte_vocabulary(words: Iterable[str] = ()) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """The 256 bytes as byte-level BPE writes them, and merges that make each of these (ASCII) words one token."""
    vocabulary = {symbol: number for number, symbol in enumerate(sorted(bytes_to_unicode().values()))}
    merges: list[tuple[str, str]] = []
    for word in words:
        for length in range(2, len(word) + 1):
            if word[:length] not in vocabulary:
                vocabulary[word[:length]] = len(vocabulary)
                merges.append((word[: length - 1], word[length - 1]))
    return vocabulary, merges


def byte_tokenizer(kind: Any, special: Sequence[str], *, end: str, pad: str, words: Iterable[str] = ()) -> Any:
    """A tokenizer of a class of transformers that is byte-level BPE, such as `GPT2Tokenizer`.

    special: its special tokens, `end` (of a turn) and `pad` among them.
    words: of the chat template, each of which becomes one token.
    """
    vocabulary, merges = byte_vocabulary(words)
    for token in special:
        vocabulary[token] = len(vocabulary)
    return kind(
        vocab=vocabulary,
        merges=merges,
        eos_token=end,
        pad_token=pad,
        unk_token=pad,
        additional_special_tokens=[token for token in special if token not in (end, pad)],
    )
