"""How long something takes on a GPU, and what the GPU can do at most."""

from __future__ import annotations

from statistics import median
from typing import Protocol

import torch

from benchmarks.gpu.case import Ceilings, Run

FLUSH = 1 << 28
"""Bytes that are written to push everything else out of the second-level cache."""

LONGEST = 0.2
"""Seconds that one case is repeated for."""


class Clock(Protocol):
    """Measures."""

    def seconds(self, run: Run, *, graph: bool, cold: bool) -> float:
        """Return the median of several runs.

        Args:
            run: does the work once.
            graph: capture it, so that starting kernels takes no time.
            cold: flush the second-level cache before every run.
        """
        ...


class GpuClock:
    """Measures by events on a GPU.

    Args:
        device: of all tensors.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._flushed = torch.empty(FLUSH, dtype=torch.uint8, device=device)

    def seconds(self, run: Run, *, graph: bool, cold: bool) -> float:
        """See `Clock`."""
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            for _ in range(3):  # compiles, and fills the caches of work lists
                run()
        torch.cuda.synchronize(self.device)
        again = self._capture(run) if graph else run
        once = self._time(again, 1, cold=cold)
        repeats = max(5, min(200, int(LONGEST / max(once, 1e-6))))
        if cold:
            return median(self._time(again, 1, cold=True) for _ in range(repeats))
        return median(self._time(again, max(1, repeats // 5), cold=False) for _ in range(5))

    def _capture(self, run: Run) -> Run:
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            kept = run()
        return lambda: (captured.replay(), kept)[1]

    def _time(self, run: Run, count: int, *, cold: bool) -> float:
        """Return the mean of `count` runs in a row."""
        if cold:
            self._flushed.zero_()
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(count):
            run()
        stop.record()
        stop.synchronize()
        return start.elapsed_time(stop) / 1000 / count


def ceilings(clock: Clock, device: torch.device, *, size: int = 1 << 30, width: int = 8192) -> Ceilings:
    """Measure the bandwidth of a copy and the rate of a bfloat16 matrix product.

    Args:
        clock: that measures.
        device: to measure.
        size: bytes that are copied; each is read and written.
        width: of square matrices.
    """
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copied = clock.seconds(lambda: [target.copy_(source)], graph=True, cold=False)
    a, b = (torch.randn(width, width, device=device).bfloat16() for _ in range(2))
    c = torch.empty_like(a)
    multiplied = clock.seconds(lambda: [torch.mm(a, b, out=c)], graph=True, cold=False)
    return Ceilings(2 * size / copied, 2 * width**3 / multiplied)
