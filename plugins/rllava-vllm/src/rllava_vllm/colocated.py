"""vLLM in this process: on the trainer's GPU, with weights handed over in memory. Imports vLLM when it is made."""

from __future__ import annotations

import os
import random
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rllava_core.errors import ConfigError, RllavaError, TrainingError
from rllava_core.policy.policy import Policy
from rllava_vllm.arguments import ENVIRONMENT, engine_arguments
from rllava_vllm.asking import Ask, Said, Terms
from rllava_vllm.config import VLLMConfig
from rllava_vllm.fields import fields_of, values_of
from rllava_vllm.prompts import Picture, Prompt
from rllava_vllm.weights import describe_model, dtype_of, pieces, trusted

PIECE = 2**30
"""Bytes of weights that are handed over at once; adapters of no more than these are merged at the same time."""


class Colocated:
    """Sleeps, where it can, from the end of a batch of episodes until it is asked again or given new weights."""

    def __init__(self, config: VLLMConfig, policy: Policy) -> None:
        if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
            raise ConfigError(
                "engine.rollout.mode is colocated, and several processes train: vLLM would take their process group "
                "for its own; use mode: server"
            )
        self._fields = fields_of(policy.model.config.model_type)
        for name, value in {**ENVIRONMENT, "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}.items():
            os.environ.setdefault(name, value)
        if os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] != "0":
            raise ConfigError("VLLM_ENABLE_V1_MULTIPROCESSING must be 0 for engine.rollout.mode: colocated")
        try:
            from vllm import LLM
            from vllm.platforms import current_platform
        except ImportError as error:
            raise ConfigError(
                f"engine.rollout vllm, mode colocated, needs vLLM ({error}): pip install vllm, or use mode: server"
            ) from None
        on_cpu = current_platform.is_cpu()
        self._sleeps = _sleeps(config, on_cpu=on_cpu)
        self._awake = True
        self._names = map(str, count())
        with _randomness_kept(), _vllm_errors("start"), tempfile.TemporaryDirectory(prefix="rllava-vllm-") as directory:
            describe_model(policy, Path(directory))
            arguments = engine_arguments(
                config,
                dtype_of(policy),
                policy.adapter.context_length,
                trusted=trusted(policy),
                on_cpu=on_cpu,
            )
            self._llm: Any = LLM(model=directory, enable_sleep_mode=self._sleeps, disable_log_stats=True, **arguments)
            self._llm.init_weight_transfer_engine({"init_info": {}})

    def answer(self, asks: Sequence[Ask], terms: Terms) -> list[list[Said]]:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        engine = self._llm.llm_engine
        with _randomness_kept(), _vllm_errors("answer"):
            self._wake()
            names = []
            for ask in asks:
                parameters = SamplingParams(**ask.parameters(terms), output_kind=RequestOutputKind.FINAL_ONLY)
                names.append(next(self._names))
                engine.add_request(names[-1], self._input(ask.prompt), parameters)
            finished = {}
            while engine.has_unfinished_requests():
                finished |= {output.request_id: output for output in engine.step() if output.finished}
        return [
            [_said(output, ask) for output in finished[name].outputs] for name, ask in zip(names, asks, strict=True)
        ]

    def load(self, weights: Iterator[tuple[str, Tensor]]) -> None:
        with _randomness_kept(), _vllm_errors("take new weights"):
            if not self._awake:
                self._llm.wake_up(tags=["weights"])
            self._llm.start_weight_update()
            for piece in pieces(weights, PIECE):
                self._llm.update_weights({"update_info": {"weights": piece}})
            self._llm.finish_weight_update()
            # What older weights made of prompts and images.
            self._llm.reset_prefix_cache()
            self._llm.llm_engine.reset_encoder_cache()

    def rest(self) -> None:
        if self._sleeps and self._awake:
            with _vllm_errors("sleep"):
                self._llm.sleep(level=1)  # weights wait on the host: an evaluation may follow without new ones
            self._awake = False

    def close(self) -> None:
        """It ends with this process."""

    def _wake(self) -> None:
        if not self._awake:
            self._llm.wake_up()
            self._awake = True

    def _input(self, prompt: Prompt) -> Any:
        from vllm.inputs import mm_input, tokens_input
        from vllm.multimodal.inputs import MultiModalKwargsItems, PlaceholderRange

        if not prompt.pictures:
            return tokens_input(list(prompt.tokens))
        return mm_input(
            list(prompt.tokens),
            MultiModalKwargsItems({"image": [self._item(picture) for picture in prompt.pictures]}),
            {"image": [picture.digest for picture in prompt.pictures]},
            {"image": [PlaceholderRange(picture.offset, picture.length) for picture in prompt.pictures]},
        )

    def _item(self, picture: Picture) -> Any:
        from vllm.multimodal.inputs import (
            MultiModalBatchedField,
            MultiModalFieldElem,
            MultiModalFlatField,
            MultiModalKwargsItem,
        )

        item = {}
        for name, (value, field) in values_of(picture.features, self._fields).items():
            if field.kind == "flat":
                way: Any = MultiModalFlatField(slices=[slice(0, len(value))], keep_on_cpu=field.on_cpu)
            else:
                way = MultiModalBatchedField(keep_on_cpu=field.on_cpu)
            item[name] = MultiModalFieldElem(data=value, field=way)
        return MultiModalKwargsItem(item)


def _said(output: Any, ask: Ask) -> Said:
    tokens = tuple(output.token_ids)
    logprobs = tuple(place[token].logprob for place, token in zip(output.logprobs, tokens, strict=True))
    return Said(tokens, logprobs, {token: output.logprobs[0][token].logprob for token in ask.scored})


def _sleeps(config: VLLMConfig, *, on_cpu: bool) -> bool:
    if config.sleep == "always" and on_cpu:
        raise ConfigError("engine.rollout.sleep is always, and vLLM cannot sleep on a CPU; use auto")
    return config.sleep == "always" or (config.sleep == "auto" and not on_cpu)


@contextmanager
def _randomness_kept() -> Iterator[None]:
    """The global random states belong to the algorithm, and vLLM seeds them and draws from them."""
    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        yield
    random.setstate(states[0])
    np.random.set_state(states[1])


@contextmanager
def _vllm_errors(what: str) -> Iterator[None]:
    try:
        yield
    except RllavaError:
        raise
    except Exception as error:
        message = " ".join(f"{type(error).__name__}: {error}".split())
        raise TrainingError(f"vLLM could not {what}: {message[:1000]}") from error
