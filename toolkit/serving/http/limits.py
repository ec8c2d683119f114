"""What a server takes: so much at once, and so much in a minute."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

from toolkit.serving.engine import Engine
from toolkit.serving.http.errors import ApiError

LONGEST_WAIT = 60
"""Most seconds that a client is told to wait."""


class QueueFullError(Exception):
    """More is waiting than the server takes."""


class Queue:
    """Bounds the requests that wait, and knows how fast they go.

    Args:
        max_running: requests that the engine runs at once.
        max_waiting: most requests beyond those.
    """

    def __init__(self, max_running: int, max_waiting: int) -> None:
        self.most = max_running + max_waiting
        self._finished: deque[float] = deque(maxlen=33)
        self._placed = 0

    def load(self, engine: Engine) -> int:
        """Return the requests that run or wait."""
        return engine.num_running + engine.num_waiting + self._placed

    def is_full(self, engine: Engine) -> bool:
        """Tell whether one more would be too many."""
        return self.load(engine) >= self.most

    def check(self, engine: Engine, count: int) -> None:
        """Refuse `count` more requests where they are too many.

        Raises:
            QueueFullError: they would have to wait beyond the bound.
            ApiError: they are more than the server ever takes.
        """
        if count > self.most:
            raise ApiError(400, f"{count} answers in one request are more than the {self.most} that this server takes")
        if self.load(engine) + count > self.most:
            raise QueueFullError(f"{self.load(engine)} requests run or wait, and at most {self.most} may")

    @contextmanager
    def place(self, engine: Engine) -> Iterator[None]:
        """Hold a place for something that is not in the engine's books.

        Raises:
            QueueFullError: there is none.
        """
        self.check(engine, 1)
        self._placed += 1
        try:
            yield
        finally:
            self._placed -= 1

    def finished(self) -> None:
        """Note that a request is finished."""
        self._finished.append(time.monotonic())

    def refusal(self, error: QueueFullError) -> ApiError:
        """Return the answer to a request that is too many."""
        return ApiError(429, f"{error}; try again later", "queue_full", {"Retry-After": str(self.retry_after())})

    def retry_after(self) -> int:
        """Return the seconds, whole and at least one, after which a place is free at the pace of the last requests."""
        times = self._finished
        pace = (times[-1] - times[0]) / (len(times) - 1) if len(times) > 1 else 1.0
        return max(1, min(LONGEST_WAIT, math.ceil(pace)))


class Pace:
    """Bounds the requests of each key in a minute: a bucket that fills steadily and holds a minute's worth.

    Args:
        per_minute: requests of one key.
    """

    def __init__(self, per_minute: int) -> None:
        self.per_minute = per_minute
        self._left: dict[str | None, tuple[float, float]] = {}

    def take(self, key: str | None) -> None:
        """Count one request.

        Args:
            key: of the client, one of the server's own; `None` for all who need none.

        Raises:
            ApiError: it comes too soon.
        """
        now = time.monotonic()
        left, at = self._left.get(key, (float(self.per_minute), now))
        left = min(self.per_minute, left + (now - at) * self.per_minute / 60)
        self._left[key] = (left - (left >= 1), now)
        if left < 1:
            wait = math.ceil((1 - left) * 60 / self.per_minute)
            message = f"more than {self.per_minute} requests a minute; try again in {wait} s"
            raise ApiError(429, message, "rate_limit_exceeded", {"Retry-After": str(wait)})
