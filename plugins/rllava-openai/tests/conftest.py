"""An endpoint on loopback, which answers as a test says, fails as a test says, and remembers what it saw."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
from click.testing import CliRunner, Result

from rllava_core.cli import rllava
from rllava_openai import endpoint, pacing

KEY = "sk-test-5f1c9a7e3b"
"""What must be found nowhere but in a header of what the server was sent."""


Fault = Mapping[str, Any]
"""What happens in place of an answer: `{"status": 429, "headers": {…}, "body": "…"}`, `{"body": "…"}` with status 200,
`{"hang": True}` for longer than any test's time-out, `{"close": True}` of the connection."""


def hashed_answer(body: Mapping[str, Any]) -> str:
    """An answer that follows from everything that was asked, in the form that was asked for."""
    digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).digest()
    if "structured_outputs" in body:
        choices = body["structured_outputs"]["choice"]
        return str(choices[digest[0] % len(choices)])
    if "response_format" in body:
        properties = body["response_format"]["json_schema"]["schema"]["properties"]
        if "score" in properties:
            return json.dumps({"reason": "so it seems", "score": digest[0] % 11})
        choices = properties["choice"]["enum"]
        return json.dumps({"choice": choices[digest[0] % len(choices)]})
    return digest.hex()[: body.get("max_tokens", 8)]


class FakeEndpoint:
    """The server. Faults are used up in their order, one a request, before anything is answered.

    answer: from the body of a request to the text of the answer.
    finish_reason: of every answer.
    delay: seconds that an answer takes.
    requests, keys: bodies and `Authorization` headers, as they came.
    most_at_once: requests that were under way at one time.
    """

    def __init__(self) -> None:
        self.answer: Callable[[Mapping[str, Any]], str | Fault] = hashed_answer
        self.finish_reason = "stop"
        self.faults: list[Fault] = []
        self.delay = 0.0
        self.requests: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.times: list[float] = []
        self.most_at_once = 0
        self._at_once = 0
        self._lock = threading.Lock()
        self._over = threading.Event()
        fake = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                fake.handle(self)

            def log_message(self, *_: Any) -> None:
                return

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)
        self._thread.start()
        self.base_url = f"http://127.0.0.1:{self._server.server_address[1]}/v1"

    def close(self) -> None:
        """Be dead: nothing listens any more."""
        if not self._over.is_set():
            self._over.set()
            self._server.shutdown()
            self._server.server_close()

    def handle(self, handler: BaseHTTPRequestHandler) -> None:
        content = handler.rfile.read(int(handler.headers["Content-Length"]))
        with self._lock:
            assert handler.path == "/v1/chat/completions"
            body = json.loads(content)
            self.requests.append(body)
            self.keys.append(handler.headers.get("Authorization"))
            self.times.append(time.monotonic())
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
            fault = self.faults.pop(0) if self.faults else None
        try:
            time.sleep(self.delay)
            answered = fault or self.answer(body)
            if not isinstance(answered, str):
                self._fail(handler, answered)
            else:
                usage = {"prompt_tokens": 100, "completion_tokens": 10}
                message = {"role": "assistant", "content": answered}
                choices = [{"index": 0, "message": message, "finish_reason": self.finish_reason}]
                self._send(handler, 200, json.dumps({"choices": choices, "usage": usage}), {})
        finally:
            with self._lock:
                self._at_once -= 1

    def _fail(self, handler: BaseHTTPRequestHandler, fault: Fault) -> None:
        if "hang" in fault:
            self._over.wait(20)
        elif "close" not in fault:
            self._send(handler, fault.get("status", 200), fault.get("body", ""), fault.get("headers", {}))
        handler.close_connection = True

    def _send(self, handler: BaseHTTPRequestHandler, status: int, text: str, headers: Mapping[str, str]) -> None:
        content = text.encode()
        with self._lock:
            self._at_once -= 1  # over before the client knows it, or the next request could come first
        try:
            handler.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(content))}.items():
                handler.send_header(name, value)
            handler.end_headers()
            handler.wfile.write(content)
        except OSError:  # the client has given up
            handler.close_connection = True
        finally:
            with self._lock:
                self._at_once += 1

    def images(self) -> list[np.ndarray[Any, Any]]:
        """The pixels of every image that was sent, decoded."""
        return [
            decoded(part["image_url"]["url"])
            for request in self.requests
            for message in request["messages"]
            if isinstance(message["content"], list)
            for part in message["content"]
            if part["type"] == "image_url"
        ]


def decoded(url: str) -> np.ndarray[Any, Any]:
    prefix, _, data = url.partition(",")
    assert prefix == "data:image/png;base64"
    return np.asarray(PIL.Image.open(io.BytesIO(base64.b64decode(data))))


@pytest.fixture
def make_server() -> Iterator[Callable[[], FakeEndpoint]]:
    """For tests with several; all of them end with the test."""
    made: list[FakeEndpoint] = []

    def make() -> FakeEndpoint:
        made.append(FakeEndpoint())
        return made[-1]

    yield make
    for server in made:
        server.close()


@pytest.fixture
def server(make_server: Callable[[], FakeEndpoint]) -> FakeEndpoint:
    return make_server()


@pytest.fixture(autouse=True)
def _quick_and_apart(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Waits of milliseconds, a folder of its own, and no proxy between the client and loopback."""
    monkeypatch.setattr(pacing, "FIRST_WAIT", 0.01)
    monkeypatch.setattr(endpoint, "CONNECT_TIMEOUT", 2.0)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture
def secret(monkeypatch: pytest.MonkeyPatch) -> str:
    """The key, which the variable TEST_API_KEY holds."""
    monkeypatch.setenv("TEST_API_KEY", KEY)
    return KEY


@pytest.fixture
def run_rllava() -> Callable[..., Result]:
    """A command in this process, in the test's own folder."""
    return lambda *arguments: CliRunner().invoke(rllava, arguments, catch_exceptions=False)
