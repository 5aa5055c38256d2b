"""Many questions at once: each is looked up first, equal ones are asked once, and whatever is answered is kept."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rllava_core.mdp.messages import Message
from rllava_openai.cache import AnswerCache, key_of
from rllava_openai.chat import as_known, as_sent
from rllava_openai.completions import Completion
from rllava_openai.config import EndpointOptions
from rllava_openai.endpoint import Endpoint, NoAnswerError, StoppedError


@dataclass(frozen=True)
class Question:
    """A conversation to be continued.

    fields: of the request, beside the model and the messages.
    name: of the example, for messages.
    """

    messages: tuple[Message, ...]
    fields: Mapping[str, Any]
    name: str


@dataclass
class _Spent:
    """What was spent since it was last asked for. Counted by several threads."""

    counts: dict[str, int] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, **more: int) -> None:
        with self.lock:
            for name, number in more.items():
                self.counts[name] = self.counts.get(name, 0) + number

    def take(self) -> dict[str, int]:
        with self.lock:
            taken, self.counts = self.counts, {}
        return taken


def accept_anything(completion: Completion) -> None:
    """Any answer will do that is one."""


class Asking:
    """A model behind an endpoint, and its answers so far.

    Raises ConfigError for a key that is missing, or a cache that cannot be written to.
    """

    def __init__(self, options: EndpointOptions) -> None:
        self._options = options
        self._spent = _Spent()
        self._endpoint = Endpoint(options, self._tried)
        self._cache = None if options.cache is None else AnswerCache(Path(options.cache))

    def report(self) -> dict[str, float]:
        """Since the last report: `calls` (requests sent, failed ones included), `cache_hits` (answers that were on disk
        already), tokens read and written, and their `cost`, if there are prices."""
        spent = self._spent.take()
        names = ("calls", "failed_calls", "cache_hits", "input_tokens", "output_tokens")
        found = {name: float(spent.get(name, 0)) for name in names}
        prices = self._options.price_per_million_input, self._options.price_per_million_output
        if prices[0] is not None and prices[1] is not None:
            found["cost"] = (found["input_tokens"] * prices[0] + found["output_tokens"] * prices[1]) / 1e6
        return found

    def ask(
        self, questions: Sequence[Question], accept: Callable[[Completion], object] = accept_anything
    ) -> list[Completion]:
        """An answer to each question, in order. Raises NoAnswerError that names the question which has none."""
        return [answer for answer in self.ask_each(questions, accept) if isinstance(answer, Completion)]

    def ask_each(
        self,
        questions: Sequence[Question],
        accept: Callable[[Completion], object] = accept_anything,
        go_on: Callable[[NoAnswerError], bool] = lambda error: False,
    ) -> list[Completion | NoAnswerError]:
        """An answer to each question, in order, or why it has none.

        accept: raises MalformedError for an answer that cannot be used, which is then asked for again.
        go_on: whether the other questions are asked all the same after one has got no answer. Otherwise no further one
            is sent; those under way are waited for, since they are paid for, and kept.

        Raises ConfigError for what the config must change, and what `go_on` does not pass over; a KeyboardInterrupt
        ends as a question without answer does.
        """
        requests = [self._request(question) for question in questions]
        keys = [key_of(request, self._options.revision) for request in requests]
        known: dict[str, Completion | NoAnswerError] = {}
        missing: dict[str, int] = {}
        for number, key in enumerate(keys):
            if key in known or key in missing:
                continue
            kept = None if self._cache is None else self._cache.get(key)
            if kept is None:
                missing[key] = number
            else:
                known[key] = kept
        self._spent.add(cache_hits=len(known))
        if missing:
            self._fetch(questions, requests, missing, known, accept, go_on)
        return [known[key] for key in keys]

    def _fetch(
        self,
        questions: Sequence[Question],
        requests: Sequence[Mapping[str, Any]],
        missing: Mapping[str, int],
        known: dict[str, Completion | NoAnswerError],
        accept: Callable[[Completion], object],
        go_on: Callable[[NoAnswerError], bool],
    ) -> None:
        """Ask what is missing, and add it to what is known."""
        stop = threading.Event()

        def answer(key: str, number: int) -> Completion | NoAnswerError:
            if stop.is_set():
                raise StoppedError
            question, request = questions[number], requests[number]
            body = {**request, "messages": as_sent(question.messages, self._options.image_detail)}
            try:
                completion = self._endpoint.complete(client, body, accept, stop)
                if self._cache is not None:
                    self._cache.put(key, request, completion)
                return completion
            except BaseException as error:
                if isinstance(error, NoAnswerError) and go_on(error):
                    return error
                stop.set()  # at once, in this thread, or it would take up the next question first
                raise

        with self._endpoint.connect() as client, ThreadPoolExecutor(self._options.concurrency) as threads:
            futures = {threads.submit(answer, key, number): key for key, number in missing.items()}
            try:
                wait(futures, return_when=FIRST_EXCEPTION)
            finally:
                stop.set()
                threads.shutdown(cancel_futures=True)
        done = {key: future for future, key in futures.items() if _succeeded(future)}
        for future, key in futures.items():
            error = None if future.cancelled() else future.exception()
            if isinstance(error, NoAnswerError):
                what = f"{questions[missing[key]].name}: {self._where} gave no answer: {error}"
                raise NoAnswerError(f"{what}. {self._kept(len(done), len(futures))}", alone=error.alone)
            if error is not None and not isinstance(error, StoppedError):
                raise error
        known |= {key: future.result() for key, future in done.items()}

    def _request(self, question: Question) -> dict[str, Any]:
        """The body of a request, with the digests of images in their places."""
        messages = as_known(question.messages, self._options.image_detail)
        body = {"model": self._options.model, "messages": messages, **question.fields, **self._options.extra_body}
        return {name: value for name, value in body.items() if value is not None}

    def _tried(self, completion: Completion | None) -> None:
        if completion is None:
            self._spent.add(calls=1, failed_calls=1)
        else:
            read, written = completion.input_tokens, completion.output_tokens
            self._spent.add(calls=1, input_tokens=read, output_tokens=written)

    @property
    def _where(self) -> str:
        return f"{self._options.model} at {self._options.base_url}"

    def _kept(self, done: int, asked: int) -> str:
        if self._cache is None:
            return "Nothing is kept, since cache is null"
        return (
            f"{done} of the {asked} answers that were asked for together, and all before them, are kept in "
            f"{self._cache.folder}: give the same command again, and only what is missing is asked for"
        )


def _succeeded(future: Future[Completion | NoAnswerError]) -> bool:
    return future.done() and not future.cancelled() and future.exception() is None
