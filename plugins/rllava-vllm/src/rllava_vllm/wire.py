"""Questions and answers as vLLM's route `/inference/v1/generate` writes them: token ids in, token ids out."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import Any

import msgspec
import torch
from torch import Tensor

from rllava_core.errors import TrainingError
from rllava_vllm.asking import Ask, Said, Terms
from rllava_vllm.fields import Field, values_of
from rllava_vllm.prompts import Picture

RAW = 3
"""vLLM's code for bytes of a tensor within MessagePack."""


def question(ask: Ask, terms: Terms, images: Mapping[str, str]) -> dict[str, Any]:
    """The body of a request. images: the encoded features of each picture by its digest."""
    parameters = ask.parameters(terms)
    if ask.scored:
        # vLLM leaves the last one out where what it drew is none of them, so one more is asked for.
        spare = next(token for token in range(len(ask.scored) + 1) if token not in ask.scored)
        parameters |= {"logprob_token_ids": [*ask.scored, spare], "logprobs": len(ask.scored) + 1}
    body: dict[str, Any] = {"token_ids": list(ask.prompt.tokens), "sampling_params": parameters}
    pictures = ask.prompt.pictures
    if pictures:
        places = [{"offset": picture.offset, "length": picture.length} for picture in pictures]
        body["features"] = {
            "mm_hashes": {"image": [picture.digest for picture in pictures]},
            "mm_placeholders": {"image": places},
            "kwargs_data": {"image": [images[picture.digest] for picture in pictures]},
        }
    return body


def answers(body: Any, ask: Ask, versions: frozenset[str]) -> list[Said]:
    """What a response says. Raises TrainingError if it does not say what was asked, or not from one of the versions of
    the weights that the server has been given."""
    try:
        choices = sorted(body["choices"], key=lambda choice: choice["index"])
        found = [_said(choice, ask, versions) for choice in choices]
    except (KeyError, TypeError, IndexError) as error:
        raise TrainingError(
            f"{ask.prompt.name}: the vLLM server's answer is not as expected ({type(error).__name__}: {error}); this "
            "plugin was written for vLLM 0.32"
        ) from None
    if len(found) != ask.count:
        raise TrainingError(f"{ask.prompt.name}: the vLLM server gave {len(found)} of {ask.count} answers")
    return found


def _said(choice: Mapping[str, Any], ask: Ask, versions: frozenset[str]) -> Said:
    spans = choice.get("weight_versions") or []
    other = sorted({span["version"] for span in spans} - versions)
    if other:
        raise TrainingError(
            f"{ask.prompt.name}: the vLLM server answers from weights of version {other[0]!r}, which this run has not "
            "given it: it was restarted, or another run uses it too; go on with --resume, which gives them anew"
        )
    content, tokens = choice["logprobs"]["content"], choice["token_ids"]
    if len(content) != len(tokens):
        raise TrainingError(f"{ask.prompt.name}: the vLLM server gave {len(content)} log-probs of {len(tokens)} tokens")
    scores = {item["token_id"]: item["logprob"] for item in content[0]["top_logprobs"]} if ask.scored else {}
    return Said(
        tuple(tokens),
        tuple(place["logprob"] for place in content),
        {token: scores[token] for token in ask.scored},
    )


def encoded(picture: Picture, fields: Mapping[str, Field]) -> str:
    """The features of an image: MessagePack in the form that vLLM decodes into a `MultiModalKwargsItem`, in base 64."""
    item = {}
    for name, (value, field) in values_of(picture.features, fields).items():
        options: dict[str, Any] = {"keep_on_cpu": field.on_cpu}
        if field.kind == "flat":
            options |= {"slices": [[0, len(value), None]], "dim": 0}
        item[name] = {"data": _tensor(value), "field": [field.kind, options]}
    return base64.b64encode(msgspec.msgpack.encode(item)).decode()


def _tensor(value: Tensor) -> list[Any]:
    raw = value.contiguous().cpu().reshape(-1).view(torch.uint8).numpy().tobytes()
    return [str(value.dtype).removeprefix("torch."), list(value.shape), msgspec.msgpack.Ext(RAW, raw)]
