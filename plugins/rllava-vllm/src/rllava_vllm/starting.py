"""A server that the run starts, and ends with itself."""

from __future__ import annotations

import atexit
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from urllib.parse import urlsplit

import httpx

from rllava_core.errors import ConfigError, TrainingError
from rllava_core.policy.policy import Policy
from rllava_vllm.arguments import engine_arguments
from rllava_vllm.config import VLLMConfig
from rllava_vllm.serve import STARTED_BY, flags
from rllava_vllm.weights import describe_model, dtype_of, trusted

LOCAL = ("127.0.0.1", "localhost", "::1")

TAIL = 2000
"""Characters of the server's log that a message shows."""


class Started:
    """The process, and a directory of its own for the model's config and the server's log."""

    def __init__(self, command: list[str], directory: tempfile.TemporaryDirectory[str], url: str, limit: float) -> None:
        self._directory = directory
        self._log = Path(directory.name) / "server.log"
        self._url = url
        self._limit = limit
        with self._log.open("wb") as log:
            # A session of its own: Ctrl-C is for the run, which ends the server when it has saved.
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env={**os.environ, STARTED_BY: str(os.getpid())},
            )
        atexit.register(self.stop)

    def wait(self) -> None:
        """Until it answers. Raises TrainingError if it ends before, or takes longer than it may."""
        deadline = time.monotonic() + self._limit
        while self._process.poll() is None and time.monotonic() < deadline:
            try:
                if httpx.get(f"{self._url}/health", timeout=5.0, trust_env=False).status_code == 200:
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.5)
        became = self.what_became_of_it()
        self.stop()
        raise TrainingError(f"the vLLM server did not start, for which it had {self._limit:.0f} s: {became}")

    def what_became_of_it(self) -> str:
        """For messages: whether it runs, and the end of its log."""
        code = self._process.poll()
        state = "it is still running" if code is None else f"it ended with code {code}"
        words = self._log.read_text(encoding="utf-8", errors="replace")[-TAIL:] if self._log.exists() else ""
        return f"{state}; the end of its log:\n{words.strip()}"

    def stop(self) -> None:
        """Ends the process; again does no harm."""
        atexit.unregister(self.stop)
        if self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(30)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        self._directory.cleanup()


def start(config: VLLMConfig, policy: Policy) -> Started:
    """Raises ConfigError without vLLM, for a url of another machine, or where a server is there already."""
    where = urlsplit(config.url)
    if where.hostname not in LOCAL or where.scheme != "http":
        raise ConfigError(f"engine.rollout.start is for a server on this machine, and url is {config.url}")
    try:
        from vllm.platforms import current_platform
    except ImportError as error:
        raise ConfigError(f"engine.rollout.start needs vLLM ({error}): pip install vllm") from None
    try:
        httpx.get(f"{config.url}/health", timeout=2.0, trust_env=False)
    except httpx.TransportError:
        pass
    else:
        raise ConfigError(f"engine.rollout.start: something answers at {config.url} already; name another port")
    directory = tempfile.TemporaryDirectory(prefix="rllava-vllm-")
    describe_model(policy, Path(directory.name))
    arguments = engine_arguments(
        config,
        dtype_of(policy),
        policy.adapter.context_length,
        trusted=trusted(policy),
        on_cpu=current_platform.is_cpu(),
    )
    options = {**arguments, "host": where.hostname, "port": where.port or 80}
    command = [sys.executable, "-m", "rllava_vllm.serve", directory.name, *flags(options)]
    return Started(command, directory, config.url, config.start_timeout)
