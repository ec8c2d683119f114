"""What torch's allocator held, as its own profiler tells."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate

from torch.profiler import ProfilerActivity, profile


def peak_bytes(run: Callable[[], object]) -> int:
    """Run a function; return the largest sum of what it had allocated and not freed yet."""
    return max(_course(run))


def held_bytes(run: Callable[[], object]) -> int:
    """Run a function; return what is still held for its result."""
    return _course(run)[-1]


def _course(run: Callable[[], object]) -> list[int]:
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        result = run()
    events = [e for e in found.profiler.kineto_results.events() if e.name() == "[memory]"]  # pyright: ignore[reportOptionalMemberAccess]
    del result
    changes = [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]  # pyright: ignore[reportAttributeAccessIssue]
    return list(accumulate(changes))
