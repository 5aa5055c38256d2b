"""When the next request may go: a rate that is kept, pauses that a server asks for, and waits between two tries."""

from __future__ import annotations

import email.utils
import random
import threading
import time
from collections.abc import Mapping

FIRST_WAIT = 1.0
"""Seconds before the second try; every further wait is twice as long."""

MOST_DOUBLINGS = 6

_jitter = random.Random()  # of its own: the global random state belongs to the run and is seeded


class Pace:
    """Shared by all requests to one endpoint."""

    def __init__(self, requests_per_minute: float | None) -> None:
        self._interval = 0.0 if requests_per_minute is None else 60.0 / requests_per_minute
        self._next = 0.0
        self._lock = threading.Lock()

    def wait(self, stop: threading.Event) -> None:
        """Until the next request may go, or `stop` is set. Requests keep the interval between them."""
        while not stop.is_set():
            with self._lock:
                now = time.monotonic()
                if now >= self._next:
                    self._next = now + self._interval
                    return
                remaining = self._next - now
            # Asked again afterwards, for somebody may have asked for a longer pause, or have gone first.
            stop.wait(remaining)

    def pause(self, seconds: float) -> None:
        """No request goes before that: the server is asked by all at once, so all must wait."""
        with self._lock:
            self._next = max(self._next, time.monotonic() + seconds)


def backoff(tries: int, longest: float) -> float:
    """Seconds to wait after so many failed tries: doubled every time, and drawn from the upper half of that so that
    requests which failed together do not come back together."""
    full = FIRST_WAIT * 2.0 ** min(tries - 1, MOST_DOUBLINGS)
    return min(full * _jitter.uniform(0.5, 1.0), longest)


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds that a server asks to wait: a number or a date of HTTP. None where it asks for nothing readable."""
    asked = headers.get("retry-after", "").strip()
    try:
        seconds = float(asked)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(asked).timestamp() - time.time()
        except (ValueError, TypeError, OverflowError):
            return None
    return max(seconds, 0.0) if seconds == seconds and seconds != float("inf") else None
