"""What the steps of requests leave, given to a training run: a window of tokens at a time.

Miao et al., "FlexLLM: A System for Co-Serving Large Language Model Inference and Parameter-Efficient Finetuning",
arXiv:2402.18789. A step serves its requests first. What is left of its budget of tokens, and of the time that it may
last, goes to the next window of the run (`toolkit.adapters.training.token_windows`), which computes while the engine
waits: neither disturbs the other, and no request is put off by more than one window.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from toolkit.adapters.training._windows import Turn

FIRST = 8
"""Tokens of the first window of a run, from which the time of others is told."""

IDLE_SECONDS = 0.02
"""How long an engine without requests waits for a run that is busy with something else."""


class StoppedError(Exception):
    """The run that waits for a turn is to end."""


@dataclass
class _Measured:
    """What windows of one kind took.

    Attributes:
        tokens: of the last.
        seconds: of the last.
        least: seconds of the fastest.
    """

    tokens: int = 0
    seconds: float = 0.0
    least: float = 0.0

    def note(self, tokens: int, seconds: float) -> None:
        """Learn from a window."""
        self.least = min(self.least, seconds) if self.tokens else seconds
        self.tokens, self.seconds = tokens, seconds

    def fitting(self, seconds: float) -> int:
        """Return how many tokens take so long, at most twice as many as the last window had."""
        if not self.tokens:
            return FIRST
        if seconds < self.least:
            return 0
        return max(1, min(int(self.tokens * seconds / self.seconds), 2 * self.tokens))


class Turns:
    """Hands steps' remainders to one run in another thread, which waits for them in `turn`; a `Pace`.

    Args:
        step_seconds: how long a step may last with a window in it.
        settle: waits until the device has done what it was asked for, so that time can be told.
        clock: seconds, for tests.

    Attributes:
        tokens: that runs had gradients computed for, or a loss.
    """

    def __init__(
        self,
        step_seconds: float = 0.05,
        settle: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.step_seconds, self.settle, self.clock = step_seconds, settle, clock
        self.tokens = 0
        self._changed = threading.Condition()
        self._open = self._stopped = self._wanted = False
        self._given: Turn | None = None
        self._forward, self._backward = _Measured(), _Measured()

    @property
    def is_open(self) -> bool:
        """Whether there is a run, which may want a turn at any moment."""
        return self._open

    def open(self) -> None:
        """Begin a run."""
        with self._changed:
            self._open, self._stopped = True, False
            self._forward, self._backward = _Measured(), _Measured()

    def stop(self) -> None:
        """Have the run end with `StoppedError` when it next wants a turn."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()

    def close(self) -> None:
        """End a run; called by its own thread."""
        with self._changed:
            self._open = self._wanted = False
            self._changed.notify_all()

    @contextmanager
    def turn(self) -> Iterator[Turn]:
        """Wait until a step gives a turn; the engine waits until the block is over.

        Raises:
            StoppedError: the run is to end.
        """
        with self._changed:
            self._wanted = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._given is not None or self._stopped)
            if self._given is None:
                self._wanted = False
                raise StoppedError
            turn = self._given
        started = self.clock()
        try:
            yield turn
        finally:
            self.settle()
            with self._changed:
                self._note(turn, self.clock() - started)
                self._given, self._wanted = None, False
                self._changed.notify_all()

    def _note(self, turn: Turn, seconds: float) -> None:
        if turn.spent_forward:
            self._forward.note(turn.spent_forward, seconds)
        if turn.spent_backward:
            self._backward.note(turn.spent_backward, seconds)
            self.tokens += turn.spent_backward

    def give(self, tokens: int, seconds: float, *, idle: bool) -> None:
        """Let the run compute a window, if it waits for one and there is room; return when it has.

        Args:
            tokens: left of the step's budget.
            seconds: that the step has lasted.
            idle: the step had no requests, so that there is time to wait for the run.
        """
        if not self._open:
            return
        with self._changed:
            if idle:
                self._changed.wait_for(lambda: self._wanted or not self._open, IDLE_SECONDS)
            turn = self._fitting(tokens, self.step_seconds - seconds)
            if not self._wanted or self._stopped or turn is None:
                return
            self._given = turn
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._given is None)

    def _fitting(self, tokens: int, seconds: float) -> Turn | None:
        """Return a turn that takes no more tokens and no longer, `None` if there is none."""
        forward = min(tokens, self._forward.fitting(seconds))
        backward = min(tokens, self._backward.fitting(seconds))
        return Turn(forward, backward) if min(forward, backward) > 0 and seconds > 0 else None
