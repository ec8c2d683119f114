"""The engine in a thread of its own: steps while there is work, and runs what other threads ask for in between."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

from toolkit.serving.engine import Engine

T = TypeVar("T")
log = logging.getLogger("toolkit.serving")


class EngineLoop:
    """Owns the thread that an engine runs in.

    Args:
        engine: touched by nobody else from `start` to `stop`.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._calls: queue.SimpleQueue[tuple[Callable[[Engine], Any], Future[Any]] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    @property
    def alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    def start(self) -> None:
        """Start stepping."""
        self._thread.start()

    def stop(self) -> None:
        """Stop after the running step; what is unfinished ends with an error."""
        self._calls.put(None)
        self._thread.join()

    def call(self, function: Callable[[Engine], T]) -> Future[T]:
        """Run `function(engine)` in the engine's thread, between two steps."""
        future: Future[T] = Future()
        self._calls.put((function, future))
        return future

    def _run(self) -> None:
        busy = False
        while True:
            if not self._serve_calls(wait=not busy):
                self.engine.fail_all("the server was stopped")
                return
            try:
                busy = self.engine.step()
            except Exception:
                # A fault in one step must not take the server down: its requests fail, the next ones are served.
                log.exception("a step failed; its requests end with an error")
                self.engine.fail_all("the engine failed; see the server's log")
                busy = False

    def _serve_calls(self, *, wait: bool) -> bool:
        """Run what is queued, waiting for the first if there is nothing else to do; `False` means stop."""
        while True:
            try:
                item = self._calls.get(block=wait)
            except queue.Empty:
                return True
            if item is None:
                return False
            wait = False
            function, future = item
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(function(self.engine))
                except BaseException as error:
                    future.set_exception(error)
