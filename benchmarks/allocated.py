"""What torch's allocator held, as its own profiler tells."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import accumulate

from torch.profiler import ProfilerActivity, profile


def peak_bytes(run: Callable[[], object]) -> int:
    """Run a function; return the largest sum of what it had allocated and not freed yet."""
    return max(_course(run))


def held_bytes(run: Callable[[], object]) -> int:
    """Run a function; return what is still held for its result."""
    return _course(run)[-1]


def _course(run: Callable[[], object]) -> list[int]:
    with _unheard(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        result = run()
    events = [e for e in found.profiler.kineto_results.events() if e.name() == "[memory]"]  # pyright: ignore[reportOptionalMemberAccess]
    del result
    changes = [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]  # pyright: ignore[reportAttributeAccessIssue]
    return list(accumulate(changes))


@contextmanager
def _unheard() -> Iterator[None]:
    """Drop what the profiler writes to standard error, past Python."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
