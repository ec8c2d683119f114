"""Progress of long work: bars on a terminal, a line now and then elsewhere, nothing when quiet."""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol

from toolkit.tables import human_bytes

LINE_EVERY = 5.0
"""Seconds between two lines about the same work where the output is no terminal."""


@dataclass(frozen=True)
class State:
    """How far a piece of work is.

    Attributes:
        label: what is being done.
        total: how many units there are.
        done: how many of them are done.
        unit: `"B"` for bytes, else a word such as `"steps"`.
        text: shown beside it.
    """

    label: str
    total: float
    done: float = 0.0
    unit: str = ""
    text: str = ""


class Board(Protocol):
    """Shows the state of several pieces of work at once."""

    def show(self, key: str, state: State, *, final: bool = False) -> None:
        """Show a new state of the work called `key`."""


class Progress:
    """One piece of work; counts what is done and tells the board.

    Args:
        board: where it is shown.
        state: at the start.
    """

    def __init__(self, board: Board, state: State) -> None:
        self.board, self.state = board, state

    def advance(self, amount: float = 1) -> None:
        """Count `amount` more units as done.

        Raises:
            KeyboardInterrupt: there was one, and Python lost it; see `interruptible`.
        """
        _raise_lost_interrupt()
        self.state = replace(self.state, done=self.state.done + amount)
        self.board.show(self.state.label, self.state)

    def note(self, text: str) -> None:
        """Show a short text beside the count."""
        self.state = replace(self.state, text=text)


_interrupted = False


@contextmanager
def interruptible() -> Iterator[None]:
    """Make Ctrl-C end the block wherever it arrives.

    An exception that is raised while an object is being finalised is printed and forgotten, `KeyboardInterrupt` too;
    work that shows progress then raises it again.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, frame: object) -> None:
        global _interrupted
        _interrupted = True
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        _forget_interrupt()


def _raise_lost_interrupt() -> None:
    if _interrupted:
        _forget_interrupt()
        raise KeyboardInterrupt


def _forget_interrupt() -> None:
    global _interrupted
    _interrupted = False


@contextmanager
def track(label: str, total: float, *, unit: str = "", quiet: bool = False) -> Iterator[Progress]:
    """Show the progress of the block.

    Args:
        label: what is being done.
        total: how many units there are.
        unit: `"B"` for bytes, else a word such as `"steps"`.
        quiet: show nothing.
    """
    with board(quiet=quiet) as shown:
        progress = Progress(shown, State(label, total, unit=unit))
        yield progress
        shown.show(label, progress.state, final=True)


@contextmanager
def board(*, quiet: bool = False) -> Iterator[Board]:
    """Show the states that are reported inside the block."""
    if quiet:
        yield _Silent()
    elif _redirect is not None:
        yield _Forward(_redirect)
    elif sys.stderr.isatty():
        with _bars() as bars:
            yield bars
    else:
        yield _Lines()


_redirect: Callable[[State], None] | None = None


def redirect(receive: Callable[[State], None] | None) -> None:
    """Send all progress of this process to a function instead of showing it, or show it again with `None`."""
    global _redirect
    _redirect = receive


class _Silent:
    def show(self, key: str, state: State, *, final: bool = False) -> None:
        pass


class _Forward:
    """Passes states on, at most five a second."""

    def __init__(self, receive: Callable[[State], None]) -> None:
        self.receive, self.last = receive, 0.0

    def show(self, key: str, state: State, *, final: bool = False) -> None:
        if final or time.monotonic() - self.last >= 0.2:
            self.last = time.monotonic()
            self.receive(state)


class _Lines:
    def __init__(self) -> None:
        self.last: dict[str, float] = {}

    def show(self, key: str, state: State, *, final: bool = False) -> None:
        now = time.monotonic()
        if not final and now - self.last.setdefault(key, now) < LINE_EVERY:
            return
        self.last[key] = now
        share = f"{100 * state.done / state.total:.0f}%" if state.total else ""
        of = f"/{state.total:.0f}" if state.total else ""
        amount = human_bytes(state.done) if state.unit == "B" else f"{state.done:.0f}{of} {state.unit}"
        print(" ".join(p for p in (state.label, share, amount, state.text) if p), file=sys.stderr, flush=True)


class _Bars:
    def __init__(self, bars: Any) -> None:
        self.bars = bars
        self.tasks: dict[str, Any] = {}

    def show(self, key: str, state: State, *, final: bool = False) -> None:
        if key not in self.tasks:
            self.tasks[key] = self.bars.add_task(state.label, total=state.total, text="", amount="")
        amount = human_bytes(state.done) if state.unit == "B" else f"{state.done:.0f}/{state.total:.0f} {state.unit}"
        self.bars.update(self.tasks[key], completed=state.done, total=state.total, text=state.text, amount=amount)


@contextmanager
def _bars() -> Iterator[_Bars]:
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as RichProgress

    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        TextColumn("{task.fields[amount]}"),
        TimeRemainingColumn(compact=True),
        TextColumn("{task.fields[text]}", style="dim"),
    )
    with RichProgress(*columns, console=Console(stderr=True)) as bars:
        yield _Bars(bars)
