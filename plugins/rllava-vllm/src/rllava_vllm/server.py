"""vLLM as a server, on this machine or another, which is reached by HTTP alone: this process needs no vLLM."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from rllava_core.engines.world import Alone, Processes, World, together
from rllava_core.errors import ConfigError, ModelError
from rllava_core.policy.policy import Policy
from rllava_vllm.arguments import exact_arguments
from rllava_vllm.asking import Ask, Said, Terms
from rllava_vllm.client import CONNECTIONS, Client, RefusedError
from rllava_vllm.config import VLLMConfig
from rllava_vllm.fields import fields_of
from rllava_vllm.starting import Started, start
from rllava_vllm.weights import encoded, pieces
from rllava_vllm.wire import answers, question
from rllava_vllm.wire import encoded as encoded_picture

HOW = "python -m rllava_vllm.serve MODEL --port PORT"
"""How a server is started."""


class Server:
    """Questions are asked side by side, so that vLLM answers them in one batch. Of several processes that train, all
    ask, and the first gives it the weights.

    Raises ConfigError for a server that would not answer as the policy does, TrainingError for one that is not there.
    """

    def __init__(self, config: VLLMConfig, policy: Policy, world: World | None = None) -> None:
        self._config = config
        self._fields = fields_of(policy.model.config.model_type)
        self._world = world or _world()
        self._run = self._world.gathered(uuid.uuid4().hex[:12])[0]
        self._versions: frozenset[str] = frozenset()
        self._process: Started | None = None
        self._client = Client(config.url, config.patience, config.timeout, self._gone)
        self._by_the_first(lambda: self._begin(policy))

    def answer(self, asks: Sequence[Ask], terms: Terms) -> list[list[Said]]:
        pictures = {picture.digest: picture for ask in asks for picture in ask.prompt.pictures}
        images = {digest: encoded_picture(picture, self._fields) for digest, picture in pictures.items()}
        with ThreadPoolExecutor(min(len(asks), CONNECTIONS)) as pool:
            return list(pool.map(lambda ask: self._ask(ask, terms, images), asks))

    def load(self, weights: Iterator[tuple[str, Tensor]]) -> None:
        version = f"{self._run}-{len(self._versions)}"
        self._by_the_first(lambda: self._load(weights, version))
        self._versions |= {version}

    def rest(self) -> None:
        """Its memory is its own."""

    def close(self) -> None:
        """End the server, if it was started here."""
        self._client.close()
        if self._process is not None:
            self._process.stop()

    def _begin(self, policy: Policy) -> None:
        if self._config.start:
            self._process = start(self._config, policy)
            self._process.wait()
        _check_arguments(self._arguments(), self._config)
        self._client.post("/init_weight_transfer_engine", {"init_info": {}})

    def _load(self, weights: Iterator[tuple[str, Tensor]], version: str) -> None:
        post = self._client.post
        post("/pause?mode=wait")  # what is under way is answered from the weights that it began with
        try:
            post("/start_weight_update", repeatable=False)
            for piece in pieces(weights, self._config.message_mib * 2**20):
                body = {"update_info": {"safetensors": encoded(piece)}}
                post("/update_weights", body, repeatable=False)
            post("/finish_weight_update", {"weight_version": version}, repeatable=False)
            # What older weights made of prompts and images.
            post("/reset_prefix_cache")
            post("/reset_encoder_cache")
        except RefusedError as error:
            raise ConfigError(f"the vLLM server does not take the weights: {error}") from None
        post("/resume")

    def _by_the_first(self, function: Callable[[], None]) -> None:
        """Done by one process, which the others wait for; what it raises, all raise."""
        together(self._world, lambda: function() if self._world.rank == 0 else None)

    def _ask(self, ask: Ask, terms: Terms, images: Mapping[str, str]) -> list[Said]:
        try:
            body = self._client.post("/inference/v1/generate", question(ask, terms, images))
        except RefusedError as error:
            raise ModelError(f"{ask.prompt.name}: {error}") from None
        return answers(body, ask, self._versions)

    def _arguments(self) -> Any:
        try:
            return self._client.get("/server_info?config_format=json")
        except RefusedError as error:
            raise ConfigError(
                f"the server at {self._config.url} is none that can be given weights ({error}); start it with: {HOW}"
            ) from None

    def _gone(self) -> str:
        if self._process is not None:
            return self._process.what_became_of_it()
        return f"is it running? It is started with: {HOW}; or by this run, with engine.rollout.start=true"


def _world() -> World:
    distributed = torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1
    return Processes() if distributed else Alone()


def _check_arguments(info: Any, config: VLLMConfig) -> None:
    """That the server was started with the arguments without which its answers are not the policy's."""
    url = config.url
    try:
        model = info["vllm_config"]["model_config"]
        transfer = info["vllm_config"]["weight_transfer_config"] or {}
        found = {
            "logprobs_mode": model["logprobs_mode"],
            "max_logprobs": model["max_logprobs"],
            "mm_device_do_normalize": (model.get("multimodal_config") or {}).get("mm_device_do_normalize"),
            "weight_transfer_config": {"backend": transfer.get("backend")},
        }
        sequences = int(info["vllm_config"]["scheduler_config"]["max_num_seqs"])
    except (KeyError, TypeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise ConfigError(f"{url}/server_info is not as vLLM 0.32 writes it ({reason})") from None
    wanted = exact_arguments()
    wrong = [
        f"{name} is {value!r} instead of {wanted[name]!r}" for name, value in found.items() if value != wanted[name]
    ]
    if wrong:
        raise ConfigError(
            f"the vLLM server at {url} would not answer as the policy does: {'; '.join(wrong)}; start it with: {HOW}"
        )
    if sequences < config.max_sequences:
        raise ConfigError(
            f"engine.rollout.max_sequences is {config.max_sequences}, and the vLLM server at {url} was started with "
            f"--max-num-seqs {sequences}"
        )
