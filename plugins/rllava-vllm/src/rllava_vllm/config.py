"""Options of the engine. Imports no torch."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from rllava_core.engines.config import Overlapping, overlaps

OURS = frozenset(
    {
        "model",
        "tokenizer",
        "dtype",
        "load_format",
        "logprobs_mode",
        "max_logprobs",
        "mm_device_do_normalize",
        "weight_transfer_config",
        "enable_sleep_mode",
        "trust_remote_code",
        "logits_processors",
        "speculative_config",
        "quantization",
    }
)
"""Arguments of vLLM that decide whether its answers are the policy's, and so are not the user's to set."""


class VLLMConfig(Overlapping):
    """`engine: {rollout: {name: vllm, …}}`"""

    mode: Literal["colocated", "server"] = Field(
        default="colocated",
        description="colocated: in the trainer's process and on its GPU; server: a vLLM server at `url`",
    )
    url: str = Field(default="http://127.0.0.1:8000", description="where the server is")
    start: bool = Field(
        default=False, description="start the server, on this machine and at the port of `url`, and end it with the run"
    )
    max_sequences: int = Field(default=256, ge=1, description="sequences decoded at once (vLLM's max_num_seqs)")
    max_length: int | None = Field(
        default=None, ge=2, description="longest sequence, in tokens; null: the longest that the model allows"
    )
    memory_fraction: float = Field(
        default=0.45, gt=0, lt=1, description="share of the GPU's memory for vLLM's weights and cache"
    )
    cache_gib: float | None = Field(
        default=None, gt=0, description="size of the key-value cache; null: what memory_fraction leaves, on a CPU 1"
    )
    eager: bool | None = Field(
        default=None, description="no compilation and no CUDA graphs (vLLM's enforce_eager); null: so on a CPU only"
    )
    sleep: Literal["auto", "always", "never"] = Field(
        default="auto",
        description="colocated: give the GPU's memory back between rollouts; auto: where vLLM can, which is on GPUs",
    )
    options: dict[str, Any] = Field(
        default_factory=dict, description="further engine arguments of vLLM, by its own names, for a vLLM started here"
    )
    message_mib: int = Field(default=256, ge=1, description="server: weights sent in one message, unless one is larger")
    patience: float = Field(
        default=60.0, ge=0, description="server: seconds of trying again, ever less often, until it counts as dead"
    )
    timeout: float = Field(default=900.0, gt=0, description="server: seconds that an answer may take")
    start_timeout: float = Field(default=900.0, gt=0, description="server: seconds that it may take to start")

    @field_validator("url")
    @classmethod
    def _is_url(cls, url: str) -> str:
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"{url!r} begins with neither http:// nor https://")
        return url.rstrip("/")

    @field_validator("options")
    @classmethod
    def _not_ours(cls, options: dict[str, Any]) -> dict[str, Any]:
        taken = sorted({name.lstrip("-").replace("-", "_") for name in options} & OURS)
        if taken:
            raise ValueError(f"{', '.join(taken)}: set by rllava, for vLLM's answers must be those of the policy")
        return options

    @model_validator(mode="after")
    def _fits_the_mode(self) -> VLLMConfig:
        if self.mode == "colocated" and overlaps(self):
            raise ValueError("async is for mode: server; a colocated vLLM takes its turn with the trainer")
        if self.mode == "colocated" and self.start:
            raise ValueError("start is for mode: server")
        if self.mode == "server" and self.sleep == "always":
            raise ValueError("sleep is for mode: colocated; a server has its own memory")
        if self.mode == "server" and not self.start and self.options:
            raise ValueError("options are for a vLLM that is started here; give them to the server yourself")
        return self
