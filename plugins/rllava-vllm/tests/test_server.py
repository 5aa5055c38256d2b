"""The protocol with a server: what is sent, what is made of what comes back, and what a user is told of one that is
slow, wrong or gone. The server is a script on the loopback interface."""

from __future__ import annotations

import base64
import json
import math
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import msgspec
import pytest
import torch
from safetensors.torch import load

from rllava_core.engines.protocol import RolloutSetup
from rllava_core.errors import ConfigError, ModelError, TrainingError
from rllava_core.mdp.trajectory import ContextSegment
from rllava_core.policy.media import MediaStore
from rllava_core.policy.sampling import Request
from rllava_core.testing.rollouts import Shown, picture, request
from rllava_vllm import client as client_module
from rllava_vllm.asking import Ask, terms_of
from rllava_vllm.config import VLLMConfig
from rllava_vllm.engine import VLLMRolloutEngine
from rllava_vllm.prompts import prompt_of
from rllava_vllm.server import Server

INFO = {
    "vllm_config": {
        "model_config": {
            "logprobs_mode": "processed_logprobs",
            "max_logprobs": 128,
            "multimodal_config": {"mm_device_do_normalize": False},
        },
        "weight_transfer_config": {"backend": "rllava"},
        "scheduler_config": {"max_num_seqs": 256},
    }
}


class Fake:
    """A server that keeps what it is sent. `faults`: statuses to answer a path with before it works."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, Any]] = []
        self.faults: dict[str, list[int]] = {}
        self.info: Any = INFO
        self.version = "default"
        self.weights: dict[str, torch.Tensor] = {}
        fake = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                self._answer(None)

            def do_POST(self) -> None:
                raw = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                self._answer(json.loads(raw) if raw else None)

            def _answer(self, body: Any) -> None:
                status, content = fake.handle(self.path, body)
                data = json.dumps(content).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: Any) -> None:
                """Nothing."""

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    def handle(self, path: str, body: Any) -> tuple[int, Any]:
        self.calls.append((path, body))
        if self.faults.get(path):
            status = self.faults[path].pop(0)
            return status, {"error": {"message": "not today"}}
        if path.startswith("/server_info"):
            return 200, self.info
        if path == "/update_weights":
            self.weights |= load(base64.b64decode(body["update_info"]["safetensors"]))
        if path == "/finish_weight_update":
            self.version = body["weight_version"]
        if path == "/inference/v1/generate":
            return 200, self.generate(body)
        return 200, {}

    def generate(self, body: Any) -> Any:
        parameters = body["sampling_params"]
        choices = []
        for index in range(parameters["n"]):
            tokens = [70 + index, 274][: parameters["max_tokens"]]
            scores = [{"token_id": token, "logprob": -0.1 * token} for token in parameters.get("logprob_token_ids", ())]
            content = [{"token_id": token, "logprob": -1.5, "top_logprobs": scores} for token in tokens]
            spans = [{"version": self.version, "start": 0, "end": len(tokens)}]
            choice = {"index": index, "token_ids": tokens, "logprobs": {"content": content}, "weight_versions": spans}
            choices.insert(0, choice)  # in any order
        return {"choices": choices}

    def sent(self, path: str) -> list[Any]:
        return [body for called, body in self.calls if called == path]


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[Fake]:
    monkeypatch.setattr(client_module, "FIRST_PAUSE", 0.01)
    fake = Fake()
    yield fake
    fake.http.shutdown()
    fake.http.server_close()


@pytest.fixture
def engine(fake: Fake, make_policy: Callable[..., Any]) -> Iterator[VLLMRolloutEngine]:
    policy = make_policy()
    config = VLLMConfig(mode="server", url=fake.url + "/", patience=1.0, message_mib=1)
    media = MediaStore(policy.adapter)
    engine = VLLMRolloutEngine(config, RolloutSetup(policy, media, policy.eval))
    engine.policy = policy  # type: ignore[attr-defined]
    yield engine
    host = engine._host
    assert isinstance(host, Server)
    host.close()


def asked(engine: Any, shown: Shown, count: int = 1) -> Request:
    adapter = engine.policy.adapter
    return request(adapter, MediaStore(adapter), shown, count)


def test_the_weights_arrive_before_anything_is_asked_and_after_every_sync(fake: Fake, engine: Any) -> None:
    order = [path for path, _ in fake.calls if path not in ("/server_info?config_format=json", "/update_weights")]
    assert order == [
        "/init_weight_transfer_engine",
        "/pause?mode=wait",
        "/start_weight_update",
        "/finish_weight_update",
        "/reset_prefix_cache",
        "/reset_encoder_cache",
        "/resume",
    ]
    expected = dict(engine.policy.model.named_parameters())
    assert fake.weights.keys() == expected.keys()
    assert all(torch.equal(values, expected[name]) for name, values in fake.weights.items())
    assert len(fake.sent("/update_weights")) > 1  # a message has its limit
    first = fake.version
    engine.sync(engine.policy)
    assert fake.version != first


def test_tokens_and_features_go_out_and_tokens_and_log_probs_come_back(fake: Fake, engine: Any) -> None:
    image = picture(40, 56, 1)
    question = asked(engine, Shown(("Is ", image, "?"), max_tokens=5), 3)
    [actions] = engine.generate([question], 4)
    [body] = fake.sent("/inference/v1/generate")
    [segment] = question.context
    assert isinstance(segment, ContextSegment)
    assert body["token_ids"] == list(segment.tokens)
    assert body["features"]["mm_hashes"] == {"image": [image.digest]}
    [place] = body["features"]["mm_placeholders"]["image"]
    pad = engine.policy.adapter.image_token
    assert segment.tokens[place["offset"] : place["offset"] + place["length"]] == (pad,) * place["length"]
    [encoded] = body["features"]["kwargs_data"]["image"]
    item = msgspec.msgpack.decode(base64.b64decode(encoded))
    dtype, shape, raw = item["pixel_values"]["data"]
    pixels = torch.frombuffer(bytearray(raw.data), dtype=getattr(torch, dtype)).view(shape)
    [features] = MediaStore(engine.policy.adapter).features([image])
    assert torch.equal(pixels, features["pixel_values"])
    assert item["image_grid_thw"]["data"][1] == [3]
    assert body["sampling_params"]["n"] == 3
    assert [action.tokens for action in actions] == [(70, 274), (71, 274), (72, 274)]
    assert actions[0].logprobs.tolist() == [-1.5, -1.5]
    assert actions[0].ended


def test_a_prompt_without_images_has_no_features(fake: Fake, engine: Any) -> None:
    engine.generate([asked(engine, Shown(("Two and two?",)))], 0)
    assert "features" not in fake.sent("/inference/v1/generate")[0]


def test_choices_are_scored_with_one_token_to_spare(fake: Fake, engine: Any) -> None:
    """vLLM's route leaves out the last of the tokens that were asked for, if it drew another one."""
    [[action]] = engine.generate([asked(engine, Shown(("Up?",), ("y", "n")))], None)
    [body] = fake.sent("/inference/v1/generate")
    y, n = engine.policy.adapter.encode("y")[0], engine.policy.adapter.encode("n")[0]
    assert body["sampling_params"]["logprob_token_ids"] == [y, n, 0]
    assert body["sampling_params"]["logprobs"] == 3
    assert action.text == ("y" if y < n else "n")  # the likelier, by the script
    assert action.logprobs[0] == pytest.approx(-math.log1p(math.exp(-0.1 * abs(y - n))), abs=1e-5)


def test_a_busy_server_is_asked_again(fake: Fake, engine: Any) -> None:
    fake.faults["/inference/v1/generate"] = [503, 500]
    engine.generate([asked(engine, Shown(("Two and two?",)))], 0)
    assert len(fake.sent("/inference/v1/generate")) == 3


def test_weights_are_never_sent_twice_by_mistake(fake: Fake, engine: Any) -> None:
    """Half a layer that comes twice would be taken for a whole one."""
    fake.faults["/update_weights"] = [500]
    before = len(fake.sent("/update_weights"))
    with pytest.raises(TrainingError, match="does not answer /update_weights"):
        engine.sync(engine.policy)
    assert len(fake.sent("/update_weights")) == before + 1


def test_what_a_server_refuses_is_said_in_its_own_words(fake: Fake, engine: Any) -> None:
    fake.faults["/inference/v1/generate"] = [400]
    with pytest.raises(ModelError, match=r"conformance: .*refuses: 400 not today"):
        engine.generate([asked(engine, Shown(("Two and two?",)))], 0)


def test_a_dead_server_is_one_clear_message(fake: Fake, engine: Any) -> None:
    fake.http.shutdown()
    fake.http.server_close()
    engine._host._client._http.close()
    engine._host._client = client_module.Client(fake.url, 0.2, 5.0, engine._host._gone)
    with pytest.raises(TrainingError) as caught:
        engine.generate([asked(engine, Shown(("Two and two?",)))], 0)
    message = str(caught.value)
    assert fake.url in message
    assert "ConnectError" in message
    assert "python -m rllava_vllm.serve" in message
    assert "tried" in message


def test_a_server_that_was_restarted_is_not_believed(fake: Fake, engine: Any) -> None:
    fake.version = "default"
    with pytest.raises(TrainingError, match=r"version 'default'.*--resume"):
        engine.generate([asked(engine, Shown(("Two and two?",)))], 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_config": {"logprobs_mode": "raw_logprobs"}}, "logprobs_mode is 'raw_logprobs'"),
        ({"weight_transfer_config": None}, "weight_transfer_config"),
        ({"model_config": {"multimodal_config": {"mm_device_do_normalize": True}}}, "mm_device_do_normalize"),
        ({"scheduler_config": {"max_num_seqs": 8}}, "--max-num-seqs 8"),
        ({"model_config": {}}, "not as vLLM"),
    ],
)
def test_a_server_whose_answers_would_not_be_the_policys_is_refused(
    change: Any, message: str, fake: Fake, make_policy: Callable[..., Any]
) -> None:
    config = dict(INFO["vllm_config"])
    for name, part in change.items():
        config[name] = {**config[name], **part} if part else part
    if not change.get("model_config", True):
        config["model_config"] = {}
    fake.info = {"vllm_config": config}
    with pytest.raises(ConfigError, match=message):
        Server(VLLMConfig(mode="server", url=fake.url, patience=0.1), make_policy())


def test_a_server_that_takes_no_weights_is_refused(fake: Fake, make_policy: Callable[..., Any]) -> None:
    fake.faults["/server_info?config_format=json"] = [404]
    with pytest.raises(ConfigError, match=r"none that can be given weights .*rllava_vllm\.serve"):
        Server(VLLMConfig(mode="server", url=fake.url, patience=0.1), make_policy())


def test_of_several_processes_the_first_gives_the_weights(fake: Fake, make_policy: Callable[..., Any]) -> None:
    class Second:
        rank, size = 1, 2

        def gathered(self, own: Any) -> list[Any]:
            """The first brings the same, but for the name of the run."""
            return ["first", own] if isinstance(own, str) else [own, own]

    policy = make_policy()
    host = Server(VLLMConfig(mode="server", url=fake.url, patience=0.1), policy, Second())
    host.load(iter(policy.model.named_parameters()))
    assert fake.calls == []
    fake.version = "first-0"  # which the first process has given it
    prompt = prompt_of([ContextSegment((1, 2, 3))], policy.adapter, MediaStore(policy.adapter), "x")
    [[said]] = host.answer([Ask(prompt, seed=1)], terms_of(policy))
    assert said.tokens == (70,)
    host.close()


def test_a_server_is_started_on_this_machine_only_and_beside_no_other(
    fake: Fake, make_policy: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match="on this machine"):
        Server(VLLMConfig(mode="server", start=True, url="http://elsewhere:8000"), make_policy())
    monkeypatch.setitem(__import__("sys").modules, "vllm", None)
    with pytest.raises(ConfigError, match="pip install vllm"):
        Server(VLLMConfig(mode="server", start=True, url=fake.url), make_policy())
