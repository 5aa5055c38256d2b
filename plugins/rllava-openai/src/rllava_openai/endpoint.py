"""One endpoint: a request is sent until it is answered, and whatever stands in the way of that is told apart.

What may pass is tried again: time-outs, lost connections, the statuses 408, 409, 429 and 5xx, and answers that cannot
be read. What will not pass ends at once: a key or a model that is refused, a request that is wrong.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import httpx2

from rllava_core.errors import ConfigError, RllavaError, printable
from rllava_openai.completions import Completion, MalformedError, error_code, error_text, read_completion
from rllava_openai.config import EndpointOptions
from rllava_openai.pacing import Pace, backoff, retry_after

UNREADABLE_TRIES = 3
"""Tries in all of a request whose answers cannot be read: each of them is paid for."""

CONNECT_TIMEOUT = 10.0
"""Seconds that a connection may take to be made: that never waits for a model."""

UNREACHED_TRIES = 3
"""Tries in all of a server that has never answered: more likely than a passing trouble is a wrong address."""

PASSING = frozenset({408, 409, 429})

REFUSED_ALONE = frozenset({400, 413, 422})
"""Statuses of one request that is wrong, too long, or about what the endpoint will not talk about."""

HOPELESS = frozenset({"insufficient_quota", "billing_hard_limit_reached"})
"""Codes that come with status 429 and do not pass by waiting."""


class NoAnswerError(RllavaError):
    """An endpoint gave no answer that can be used; the message says after what, and never holds the key.

    alone: it is the trouble of this request, whose answers cannot be read or which is refused; others may well be
        answered.
    """

    def __init__(self, message: str, *, alone: bool = False) -> None:
        super().__init__(message)
        self.alone = alone


class StoppedError(Exception):
    """Asking was stopped from outside before there was an answer."""


class _PassingError(Exception):
    """A try that failed of what may pass. after: seconds that the server asked to wait."""

    def __init__(self, problem: str, after: float | None = None) -> None:
        super().__init__(problem)
        self.after = after


class Endpoint:
    """Where a model is asked. Shared by threads.

    tried: told of every try, with its answer if there was one that can be read.

    Raises ConfigError if the variable that should hold the key is not set.
    """

    def __init__(self, options: EndpointOptions, tried: Callable[[Completion | None], None]) -> None:
        self._options = options
        self._tried = tried
        self._url = options.base_url.rstrip("/") + "/chat/completions"
        try:
            httpx2.URL(self._url)
        except httpx2.InvalidURL as error:
            raise ConfigError(f"base_url {options.base_url!r} is no address: {error}") from None
        self._key = _key(options.api_key_env)
        self._pace = Pace(options.requests_per_minute)
        self._reached = False

    def connect(self) -> httpx2.Client:
        """A client for any number of requests; closing it is the caller's. Redirects are not followed: they would take
        the key to somebody whom the config does not name."""
        headers = {"Content-Type": "application/json"}
        headers |= {} if self._key is None else {"Authorization": f"Bearer {self._key}"}
        limit = self._options.timeout
        timeout = httpx2.Timeout(limit, connect=min(limit, CONNECT_TIMEOUT))
        return httpx2.Client(
            headers=headers, timeout=timeout, limits=httpx2.Limits(max_connections=self._options.concurrency)
        )

    def complete(
        self,
        client: httpx2.Client,
        body: Mapping[str, Any],
        accept: Callable[[Completion], object],
        stop: threading.Event,
    ) -> Completion:
        """The answer to a request, once `accept` takes it, which raises MalformedError otherwise.

        Raises ConfigError for what the config must change, NoAnswerError for what else ended the tries, StoppedError
        where `stop` was set before.
        """
        tries = unreadable = 0
        while True:
            self._pace.wait(stop)
            if stop.is_set():
                raise StoppedError
            tries += 1
            after = None
            try:
                return self._try(client, body, accept)
            except MalformedError as error:
                unreadable += 1
                problem, ended = str(error), unreadable >= UNREADABLE_TRIES
            except (httpx2.ConnectError, httpx2.ConnectTimeout) as error:
                problem = f"no connection: {error}"
                if not self._reached and tries >= min(UNREACHED_TRIES, self._options.retries + 1):
                    raise ConfigError(
                        f"base_url {self._options.base_url} cannot be reached ({self._clean(str(error))}): is the "
                        "server running, and is this its address?"
                    ) from None
                ended = False
            except httpx2.TimeoutException:
                problem, ended = f"no answer within timeout={self._options.timeout:g} seconds", False
            except httpx2.RequestError as error:
                problem, ended = f"the connection was lost ({type(error).__name__}: {error})", False
            except _PassingError as error:
                problem, after, ended = str(error), error.after, False
            problem = self._clean(problem)
            wait = max(backoff(tries, self._options.longest_wait), after or 0.0)
            if wait > self._options.longest_wait:
                raise NoAnswerError(
                    f"{problem}; it asks to wait for {wait:.0f} seconds, more than longest_wait allows"
                ) from None
            if ended or tries > self._options.retries:
                counted = "1 try" if tries == 1 else f"{tries} tries, the last of which ended so"
                raise NoAnswerError(f"{problem} ({counted})", alone=unreadable == tries) from None
            if after is not None:
                self._pace.pause(after)
            stop.wait(wait)

    def _try(
        self, client: httpx2.Client, body: Mapping[str, Any], accept: Callable[[Completion], object]
    ) -> Completion:
        completion = None
        try:
            response, text = self._post(client, body)
            self._reached = True
            if response.status_code != 200:
                self._refuse(response, text)
            try:
                answered = json.loads(text)
            except ValueError:
                raise MalformedError(f"the answer is no JSON: {text[:100]!r}") from None
            completion = read_completion(answered)
            accept(completion)
            return completion
        finally:
            self._tried(completion)

    def _post(self, client: httpx2.Client, body: Mapping[str, Any]) -> tuple[httpx2.Response, str]:
        """The response and its whole text, within the time that a request may take."""
        # Escaped: half surrogate pairs, which a data set may hold, cannot be sent otherwise.
        content = json.dumps(body, ensure_ascii=True)
        deadline = time.monotonic() + self._options.timeout
        received = bytearray()
        with client.stream("POST", self._url, content=content) as response:
            for chunk in response.iter_bytes():
                received += chunk
                if time.monotonic() > deadline:  # the client's own limit begins anew with every byte
                    raise httpx2.ReadTimeout("too slow")
        return response, received.decode("utf-8", "replace")

    def _refuse(self, response: httpx2.Response, text: str) -> None:
        """Raise what a status other than 200 means."""
        try:
            body = json.loads(text)
        except ValueError:
            body = text
        status, said = response.status_code, error_text(body)[:300].strip()
        problem = f"status {status}" + (f": {said}" if said else "")
        if (status in PASSING or status >= 500) and error_code(body) not in HOPELESS:
            raise _PassingError(problem, retry_after(response.headers))
        problem = self._clean(problem)
        options = self._options
        if status in (401, 403):
            which = "no key was sent: set api_key_env" if self._key is None else f"the key in ${options.api_key_env}"
            raise ConfigError(f"{options.base_url} refuses access ({which}); {problem}")
        if status == 404:
            raise ConfigError(
                f"{options.base_url} has no such model or path: is {options.model!r} its name, and does base_url "
                f"end as the server wants it (often in /v1)? {problem}"
            )
        if 300 <= status < 400:
            raise ConfigError(
                f"{options.base_url} has moved, and redirects are not followed: change base_url; {problem}"
            )
        raise NoAnswerError(problem, alone=status in REFUSED_ALONE)

    def _clean(self, text: str) -> str:
        """One line without the key, which a server may well repeat."""
        return printable(text if self._key is None else text.replace(self._key, "[the key]"))


def _key(variable: str | None) -> str | None:
    if variable is None:
        return None
    key = os.environ.get(variable, "").strip()
    if not key:
        raise ConfigError(f"api_key_env: the environment variable {variable} is not set, and should hold the key")
    if not key.isascii() or not key.isprintable():
        raise ConfigError(f"api_key_env: the environment variable {variable} holds characters that no key has")
    return key
