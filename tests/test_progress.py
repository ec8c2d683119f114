"""Interrupts reach long work, whatever they meet on the way."""

from __future__ import annotations

import os
import signal
import time

import pytest

from toolkit.progress import interruptible, track


class Finalised:
    """Interrupted while it goes."""

    def __del__(self) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.05)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_interrupt_that_python_drops_ends_the_work_all_the_same():
    steps = []
    with pytest.raises(KeyboardInterrupt), interruptible(), track("working", 10, quiet=True) as progress:
        for step in range(10):
            steps.append(step)
            if step == 3:
                Finalised()
            progress.advance()
    assert steps == [0, 1, 2, 3]


def test_nothing_is_left_of_an_interrupt():
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), interruptible():
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)
    assert signal.getsignal(signal.SIGINT) is before
    with track("working", 1, quiet=True) as progress:
        progress.advance()
