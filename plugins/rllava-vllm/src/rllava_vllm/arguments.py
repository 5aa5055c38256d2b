"""Engine arguments of vLLM with which its answers are those of the policy, for a vLLM in this process or a server."""

from __future__ import annotations

from typing import Any

from rllava_vllm.asking import SCORED
from rllava_vllm.config import VLLMConfig
from rllava_vllm.receiving import BACKEND

CPU_BLOCK = 32
"""Tokens of a block of the cache, which prefixes are shared by, on a CPU: the smallest that vLLM's attention takes
there, whose default of 128 is longer than a prompt about a small image."""

ENVIRONMENT = {
    "VLLM_NO_USAGE_STATS": "1",  # a run tells nobody of itself
    "VLLM_LOGGING_LEVEL": "ERROR",  # every update warns of tables that are no weights
    # The threads of the trainer are not vLLM's to bind.
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}
"""Variables that are set where the user has not set them."""


def exact_arguments() -> dict[str, Any]:
    """Those that no vLLM that answers for a policy may be without."""
    return {
        # Of the distribution that is drawn from: forbidden tokens ruled out, divided by the temperature.
        "logprobs_mode": "processed_logprobs",
        "max_logprobs": SCORED + 1,
        # Images come as the trainer's own features, so nothing is left to normalise.
        "mm_device_do_normalize": False,
        "weight_transfer_config": {"backend": BACKEND},
        "enable_prefix_caching": True,
    }


def cpu_arguments(max_length: int) -> dict[str, Any]:
    """On a CPU vLLM's seeded requests cannot be read in chunks (it would rewind a generator that cannot be)."""
    batched = max(max_length, 4096)
    return {"enable_chunked_prefill": False, "max_num_batched_tokens": batched, "block_size": CPU_BLOCK}


def engine_arguments(config: VLLMConfig, dtype: str, longest: int, *, trusted: bool, on_cpu: bool) -> dict[str, Any]:
    """Of a vLLM that is started here. longest: sequence that the model allows, in tokens."""
    max_length = min(config.max_length or longest, longest)
    cache_gib = 1.0 if config.cache_gib is None and on_cpu else config.cache_gib
    arguments = {
        "dtype": dtype,
        "load_format": "dummy",  # weights are handed over
        "trust_remote_code": trusted,
        "max_model_len": max_length,
        "max_num_seqs": config.max_sequences,
        "gpu_memory_utilization": config.memory_fraction,
        "enforce_eager": on_cpu if config.eager is None else config.eager,
        **exact_arguments(),
        **(cpu_arguments(max_length) if on_cpu else {}),
    }
    if cache_gib is not None:
        arguments["kv_cache_memory_bytes"] = int(cache_gib * 2**30)
    return {**arguments, **{name.lstrip("-").replace("-", "_"): value for name, value in config.options.items()}}
