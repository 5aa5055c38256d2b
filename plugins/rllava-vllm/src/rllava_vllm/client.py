"""HTTP with a server that may be slow, busy or gone."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import httpx

from rllava_core.errors import RllavaError, TrainingError

CONNECTIONS = 64
"""Questions that a server is asked at the same time."""

FIRST_PAUSE, LONGEST_PAUSE = 0.25, 8.0
"""Seconds between two attempts: twice as many after each."""


class RefusedError(RllavaError):
    """The server understood, and will not do it; to try again would change nothing."""


class Client:
    """patience: seconds of trying again; timeout: seconds that an answer may take; gone: what to say of a server that
    does not answer, beside where it is and why."""

    def __init__(self, url: str, patience: float, timeout: float, gone: Callable[[], str]) -> None:
        self._url = url
        self._patience = patience
        self._gone = gone
        self._http = httpx.Client(
            base_url=url,
            timeout=httpx.Timeout(timeout, connect=5.0, pool=None),
            limits=httpx.Limits(max_connections=CONNECTIONS, max_keepalive_connections=CONNECTIONS),
            trust_env=False,  # a proxy for the web is none for the machine beside this one
        )

    def get(self, path: str) -> Any:
        """Raises as `post`."""
        return self._send("GET", path, None, repeatable=True)

    def post(self, path: str, body: Any = None, *, repeatable: bool = True) -> Any:
        """The answer, decoded from JSON; None if it is empty.

        repeatable: doing it twice does no harm. What is not is tried again only where the server was not reached.

        Raises RefusedError for an answer that says no, TrainingError for none.
        """
        return self._send("POST", path, body, repeatable=repeatable)

    def close(self) -> None:
        self._http.close()

    def _send(self, method: str, path: str, body: Any, *, repeatable: bool) -> Any:
        began, pause, tries = time.monotonic(), FIRST_PAUSE, 0
        while True:
            tries += 1
            try:
                response = self._http.request(method, path, json=body)
            except httpx.TransportError as error:
                cause = " ".join(f"{type(error).__name__}: {error}".split())
                again = repeatable or isinstance(error, httpx.ConnectError | httpx.ConnectTimeout)
            else:
                if response.status_code < 500:
                    return _content(response, self._url + path)
                cause, again = _reason(response), repeatable
            waited = time.monotonic() - began
            if not again or waited + pause > self._patience:
                raise TrainingError(
                    f"the vLLM server at {self._url} does not answer {path} ({cause}; tried {tries} times in "
                    f"{waited:.0f} s); {self._gone()}"
                )
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE)


def _content(response: httpx.Response, address: str) -> Any:
    if response.status_code >= 400:
        raise RefusedError(f"{address} refuses: {_reason(response)}")
    try:
        return response.json() if response.content else None
    except ValueError:
        raise RefusedError(f"{address} answers with no JSON, so it is not vLLM: {response.text[:200]!r}") from None


def _reason(response: httpx.Response) -> str:
    """The server's own words, as vLLM and FastAPI put them into JSON, behind the status."""
    words = response.text
    try:
        found = response.json()
        inner = found.get("error", found.get("detail", found))
        words = str(inner.get("message", inner) if isinstance(inner, dict) else inner)
    except (ValueError, AttributeError):
        pass
    return f"{response.status_code} {' '.join(words.split())[:500]}"
