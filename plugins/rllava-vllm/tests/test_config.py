"""What a config may say."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from rllava_vllm.arguments import cpu_arguments, engine_arguments, exact_arguments
from rllava_vllm.config import OURS, VLLMConfig
from rllava_vllm.serve import flags


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"url": "localhost:8000"}, "neither http"),
        ({"start": True}, "mode: server"),
        ({"async": 1}, "async is for mode: server"),
        ({"mode": "server", "sleep": "always"}, "mode: colocated"),
        ({"mode": "server", "options": {"block_size": 32}}, "started here"),
        ({"options": {"logprobs-mode": "raw_logprobs"}}, "logprobs_mode"),
        ({"options": {"quantization": "fp8"}}, "quantization"),
        ({"memory_fraction": 1.5}, "less than 1"),
    ],
)
def test_what_would_not_work_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        VLLMConfig(**options)


def test_a_vllm_on_a_cpu_and_on_a_gpu() -> None:
    config = VLLMConfig(max_length=500, options={"tensor-parallel-size": 2})
    on_cpu = engine_arguments(config, "float32", 2048, trusted=False, on_cpu=True)
    assert on_cpu["kv_cache_memory_bytes"] == 2**30
    assert on_cpu["enforce_eager"] is True
    assert on_cpu["enable_chunked_prefill"] is False
    assert on_cpu["max_model_len"] == 500
    assert on_cpu["tensor_parallel_size"] == 2
    on_gpu = engine_arguments(config, "bfloat16", 400, trusted=True, on_cpu=False)
    assert "kv_cache_memory_bytes" not in on_gpu
    assert (on_gpu["enforce_eager"], on_gpu["max_model_len"], on_gpu["trust_remote_code"]) == (False, 400, True)
    assert not cpu_arguments(100).keys() & on_gpu.keys()


def test_what_makes_answers_exact_is_not_the_users_to_set() -> None:
    assert exact_arguments().keys() - {"enable_prefix_caching"} <= OURS


def test_arguments_as_options_of_a_command() -> None:
    found = flags(
        {"max_model_len": 5, "enable_chunked_prefill": False, "trust_remote_code": True, "x": {"backend": "y"}}
    )
    assert found == [
        "--max-model-len",
        "5",
        "--no-enable-chunked-prefill",
        "--trust-remote-code",
        "--x",
        '{"backend": "y"}',
    ]
