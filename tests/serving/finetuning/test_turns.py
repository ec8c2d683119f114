"""What is left of a step goes to the training; requests come first, and no step lasts longer than it may."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest

from toolkit.serving.finetuning.turns import FIRST, StoppedError, Turns


class Clock:
    """Time that passes when somebody says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Run:
    """A run in a thread of its own, whose windows take `overhead + tokens x rate` on a clock.

    Args:
        turns: that it waits for.
        clock: on which its windows take time.
        work: windows: forward or backward, over and over.
    """

    def __init__(self, turns: Turns, clock: Clock, forward: float, backward: float, overhead: float = 0.0) -> None:
        self.turns, self.clock = turns, clock
        self.rates, self.overhead = (forward, backward), overhead
        self.windows: list[tuple[str, int, float]] = []
        self.stopped = False
        self._thread = threading.Thread(target=self._run, daemon=True)
        turns.open()
        self._thread.start()

    def _run(self) -> None:
        for number in range(10**9):
            try:
                with self.turns.turn() as turn:
                    started = self.clock.now
                    if number % 3:
                        turn.spent_backward = turn.backward
                    else:
                        turn.spent_forward = turn.forward
                    spent, rate = (turn.backward, self.rates[1]) if number % 3 else (turn.forward, self.rates[0])
                    self.clock.now += self.overhead + spent * rate
                    kind = "backward" if number % 3 else "forward"
                    self.windows.append((kind, spent, self.clock.now - started))
            except StoppedError:
                self.stopped = True
                return

    def end(self) -> None:
        self.turns.stop()
        self._thread.join()
        self.turns.close()


@pytest.fixture
def begun() -> Any:
    runs: list[Run] = []

    def begin(turns: Turns, clock: Clock, *rates: float, **options: float) -> Run:
        runs.append(Run(turns, clock, *rates, **options))
        return runs[-1]

    yield begin
    for run in runs:
        run.end()
        assert run.stopped


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def steps(turns: Turns, clock: Clock, run: Run, count: int, seconds: float, tokens: int) -> list[float]:
    """Run steps of requests that last so long and leave so many tokens; return how long each lasted with its window."""
    found = []
    for _ in range(count):
        until(lambda: turns._wanted)
        started = clock.now
        clock.now += seconds
        turns.give(tokens, seconds, idle=True)
        found.append(clock.now - started)
    return found


@pytest.mark.system("flexllm")
@pytest.mark.parametrize("overhead", [0.0, 0.004])
def test_a_step_lasts_no_longer_than_it_may_and_uses_what_there_is(begun, overhead):
    clock = Clock()
    turns = Turns(step_seconds=0.1, clock=clock)
    run = begun(turns, clock, 0.0002, 0.0006, overhead=overhead)
    lasted = steps(turns, clock, run, 60, 0.04, 10**6)
    assert max(lasted) <= 0.1 + overhead + 1e-9
    assert min(lasted[30:]) > 0.09, "what is left of the time is used"
    # The requests' own part grows: the windows shrink with it at once.
    lasted = steps(turns, clock, run, 30, 0.09, 10**6)
    assert max(lasted) <= 0.1 + overhead + 1e-9
    before = len(run.windows)
    assert steps(turns, clock, run, 10, 0.12, 10**6) == [pytest.approx(0.12)] * 10, "and vanish when nothing is left"
    assert len(run.windows) == before


@pytest.mark.system("flexllm")
def test_a_step_has_no_more_tokens_than_its_budget(begun):
    clock = Clock()
    turns = Turns(step_seconds=10.0, clock=clock)
    run = begun(turns, clock, 1e-6, 1e-6)
    steps(turns, clock, run, 40, 0.0, 37)
    assert max(tokens for _, tokens, _ in run.windows) == 37
    steps(turns, clock, run, 3, 0.0, 0)
    assert len(run.windows) == 40


def test_windows_begin_small_and_at_most_double(begun):
    clock = Clock()
    turns = Turns(step_seconds=1.0, clock=clock)
    run = begun(turns, clock, 0.0001, 0.0001)
    steps(turns, clock, run, 60, 0.0, 10**6)
    for kind in ("forward", "backward"):
        sizes = [tokens for k, tokens, _ in run.windows if k == kind]
        assert sizes[0] == FIRST
        assert all(later <= 2 * sooner for sooner, later in pairwise(sizes))
        assert sizes[-1] == pytest.approx(10_000, rel=0.01)


def test_tokens_with_gradients_are_counted(begun):
    clock = Clock()
    turns = Turns(clock=clock)
    run = begun(turns, clock, 0.001, 0.001)
    steps(turns, clock, run, 9, 0.0, 10**6)
    assert turns.tokens == sum(tokens for kind, tokens, _ in run.windows if kind == "backward")


def test_without_a_run_a_step_waits_for_nothing():
    turns = Turns()
    started = time.monotonic()
    for _ in range(1000):
        turns.give(100, 0.0, idle=True)
    assert time.monotonic() - started < 1


def test_a_run_that_is_busy_holds_up_requests_not_at_all_and_an_idle_engine_a_moment():
    turns = Turns()
    turns.open()
    started = time.monotonic()
    for _ in range(100):
        turns.give(100, 0.0, idle=False)
    assert time.monotonic() - started < 0.5
    turns.give(100, 0.0, idle=True)
    assert 0.01 < time.monotonic() - started < 1
    turns.close()


def test_a_window_that_fails_gives_the_engine_free():
    turns = Turns()
    turns.open()
    failed = threading.Event()

    def run() -> None:
        try:
            with turns.turn():
                raise ValueError
        except ValueError:
            turns.close()
            failed.set()

    threading.Thread(target=run, daemon=True).start()
    until(lambda: turns._wanted)
    turns.give(100, 0.0, idle=False)
    assert failed.wait(10)
    assert not turns.is_open
