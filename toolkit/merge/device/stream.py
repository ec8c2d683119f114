"""Merge one tensor on a device: bytes as stored go up, bytes as stored come down, everything between happens there.

While a slice is merged, the next one of every input is being read and the one before is being written. Where a method
reads a tensor more than once, the bytes stay on the device as far as its memory allows.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from itertools import dropwhile, islice
from typing import Any, cast

import numpy as np
import torch
from typing_extensions import override

from toolkit.checkpoints.deltas import chunks
from toolkit.checkpoints.dtypes import Bytes, DType, Floats, all_finite, encode
from toolkit.errors import UnsupportedError
from toolkit.merge import device as settings
from toolkit.merge.device.array import DeviceArray
from toolkit.merge.device.feeds import Feed, Files, feeds_of, ranges, read_bytes
from toolkit.merge.device.fused import fuse
from toolkit.merge.method import Method
from toolkit.merge.plan import Job
from toolkit.merge.statistics.files import Statistics
from toolkit.merge.stream import Scratch, Stream

_READERS = 8
"""Threads of a worker that read; each input of a slice is read by one."""

_ROOM_ON_CPU = 1 << 28
"""Bytes that may be kept where the device is the CPU itself."""


class DeviceScratch(Scratch):
    """What one thread needs to merge on a device, kept from tensor to tensor.

    Args:
        device: to merge on.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device, self.files = device, Files()
        self.readers = ThreadPoolExecutor(_READERS, thread_name_prefix="reader")
        self._queue = torch.cuda.Stream(device) if device.type == "cuda" else None

    @override
    def open(
        self, job: Job, method: Method, surveyed: Any = None, statistics: Statistics | None = None
    ) -> DeviceStream:
        return DeviceStream(job, method, self, surveyed, statistics)

    @cached_property
    def fuses(self) -> bool:
        """Whether methods run as one kernel where they are one: on GPUs that Triton compiles for."""
        known = self.device.type == "cuda" and find_spec("triton") is not None
        return known and torch.cuda.get_device_capability(self.device) >= (8, 0)

    def queue(self) -> AbstractContextManager[object]:
        """Have the device do what is asked for inside in this worker's own order, beside what other workers ask for."""
        return nullcontext() if self._queue is None else torch.cuda.stream(self._queue)

    def staging(self, size: int) -> torch.Tensor:
        """Return bytes of the host from and to which the device can copy while the host does something else.

        torch gives such memory out again only once the copies from it are done.
        """
        return torch.empty(size, dtype=torch.uint8, pin_memory=self.device.type == "cuda")

    def room(self) -> int:
        """Return bytes of the device that one tensor may keep between passes: a quarter of what is free."""
        if self.device.type != "cuda":
            return _ROOM_ON_CPU
        unused = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
        return (torch.cuda.mem_get_info(self.device)[0] + unused) // 4


class DeviceStream(Stream):
    """A tensor of every input on a device; what it yields are device arrays."""

    scratch: DeviceScratch

    def __init__(
        self,
        job: Job,
        method: Method,
        scratch: DeviceScratch,
        surveyed: Any = None,
        statistics: Statistics | None = None,
    ) -> None:
        on_device = cast(Statistics, _DeviceStatistics(statistics, scratch.device)) if statistics else None
        super().__init__(job, method, scratch, surveyed, on_device)
        first = next(chunks(self.shape, whole_rows=method.scope == "row"), (0, 1))
        self._step = first[1]
        self._feeds = feeds_of(job, scratch.files, self._step)
        self._kept: dict[tuple[int, int], list[torch.Tensor | None]] = {}
        self._room = 0

    @override
    def ranges(self) -> Iterator[tuple[int, int]]:
        return ranges(self.count, self._step * max(1, settings.SLICE // self._step))

    @override
    def stacked(self, every: int = 1, begin: int = 0) -> Iterator[tuple[int, Floats]]:
        # A sample of slices is one of short ones, or it would be most of the tensor.
        all_ = self.ranges() if every == 1 else islice(ranges(self.count, self._step), 0, None, every)
        for start, x, _ in self._slices(dropwhile(lambda slice_: slice_[1] <= begin, all_)):
            yield start, x

    @override
    def merged(self) -> Iterator[tuple[int, Floats]]:
        yield from self._merged(self.ranges())

    @override
    def merged_slice(self, start: int, stop: int) -> Floats:
        """Return one of the `ranges`, merged."""
        ((_, merged),) = self._merged([(start, stop)])
        return merged

    @override
    def encoded(self) -> Iterator[tuple[int, Bytes, bool]]:
        try:
            with self.scratch.queue():
                self._room = self.scratch.room() if self.method.prepare else 0
                yield from self._encoded()
        except torch.OutOfMemoryError:
            device = self.scratch.device
            raise UnsupportedError(
                f"{self.name}: does not fit on {device}; free memory there, or leave out --device"
            ) from None

    def _encoded(self) -> Iterator[tuple[int, Bytes, bool]]:
        """Yield each slice once the next one has been asked of the device, so that it need not wait for the disk."""
        before = None
        for start, merged in self.merged():
            this = start, self._round(merged)
            if before:
                yield before[0], *before[1].result()
            before = this
        if before:
            yield before[0], *before[1].result()

    @override
    def encoded_slice(self, start: int, stop: int) -> Bytes:
        return self._round(self.merged_slice(start, stop)).result()[0]

    def _merged(self, wanted: Sequence[tuple[int, int]] | Iterator[tuple[int, int]]) -> Iterator[tuple[int, Floats]]:
        state = self.state
        fused = fuse(self.method, self.job.params, state) if self.scratch.fuses else None
        for start, x, base in self._slices(wanted):
            self._look_through(x)
            if fused is None:
                yield start, self._on_base(self._combine(x, state, start), base)
            else:
                whole = None if base is None else cast(DeviceArray, base).tensor
                yield start, _floats(fused(cast(DeviceArray, x).tensor, whole, start))

    @override
    def _look_through(self, x: Floats) -> None:
        if not self.method.uses_all:
            # Nothing waits for the device before the last slice is there.
            self._finite = torch.isfinite(cast(DeviceArray, x).tensor).all() & self._finite

    def _slices(
        self, wanted: Sequence[tuple[int, int]] | Iterator[tuple[int, int]]
    ) -> Iterator[tuple[int, Floats, Floats | None]]:
        """Yield `(start, [M, N], [N])` of slices, all models and the base, if deltas are wanted, in float32."""
        for start, stop, raw in self._uploaded(wanted):
            values = torch.empty((len(raw), stop - start), dtype=torch.float32, device=self.scratch.device)
            for row, feed, own in zip(values, self._feeds, raw, strict=True):
                row.zero_() if own is None else row.copy_(own.view(_torch(feed.dtype)))
            if not self.is_delta:
                yield start, _floats(values), None
                continue
            *models, base = values
            for row, feed in zip(models, self._feeds, strict=False):
                if not feed.is_delta:
                    row -= base
            yield start, _floats(values[:-1]), _floats(base)

    def _uploaded(
        self, wanted: Sequence[tuple[int, int]] | Iterator[tuple[int, int]]
    ) -> Iterator[tuple[int, int, list[torch.Tensor | None]]]:
        """Yield slices as stored, on the device, while the next ones are being read."""
        pending: deque[tuple[int, int, list[_Reading | None]]] = deque()
        try:
            for start, stop in wanted:
                pending.append((start, stop, self._begin(start, stop)))
                if len(pending) == settings.DEPTH:
                    yield self._finish(*pending.popleft())
            while pending:
                yield self._finish(*pending.popleft())
        finally:
            # Whoever had enough leaves slices that are being read.
            wait([reading.done for *_, found in pending for reading in found if reading])

    def _begin(self, start: int, stop: int) -> list[_Reading | None]:
        if (start, stop) in self._kept:
            return []
        return [self._reading(feed, start, stop) if feed.read else None for feed in self._feeds]

    def _reading(self, feed: Feed, start: int, stop: int) -> _Reading:
        memory = self.scratch.staging(feed.dtype.nbytes(stop - start))
        assert feed.read is not None
        return _Reading(memory, self.scratch.readers.submit(feed.read, start, stop, memory.numpy()))

    def _finish(
        self, start: int, stop: int, found: Sequence[_Reading | None]
    ) -> tuple[int, int, list[torch.Tensor | None]]:
        if (start, stop) in self._kept:
            return start, stop, self._kept[start, stop]
        raw = [reading.upload(self.scratch.device) if reading else None for reading in found]
        size = read_bytes(self._feeds, stop - start)
        if size <= self._room:
            self._room -= size
            self._kept[start, stop] = raw
        return start, stop, raw

    def _round(self, merged: Floats) -> _Rounded:
        return _Rounded.of(cast(DeviceArray, merged).tensor, self.job.tensor.dtype, self.scratch)


@dataclass(frozen=True)
class _Reading:
    """Bytes of one input that are on their way."""

    memory: torch.Tensor
    done: Future[None]

    def upload(self, device: torch.device) -> torch.Tensor:
        """Wait for the bytes, and have the device fetch them."""
        self.done.result()
        return self.memory.to(device, non_blocking=True)


@dataclass(frozen=True)
class _Rounded:
    """A merged slice as it is stored, on its way to the host.

    Attributes:
        raw: its bytes.
        finite: whether it has neither NaN nor infinity.
        done: when both are there; `None` if they are.
        narrow: format of 8 bits that the host rounds to, since torch makes other values of those out of its range.
    """

    raw: torch.Tensor
    finite: torch.Tensor
    done: torch.cuda.Event | None
    narrow: DType | None

    @classmethod
    def of(cls, merged: torch.Tensor, dtype: DType, scratch: DeviceScratch) -> _Rounded:
        """Round a slice, to nearest with ties to even, and have the host get it."""
        narrow = dtype if dtype.bits == 8 else None
        values = merged if narrow else merged.to(_torch(dtype))
        finite = torch.isfinite(values).all().view(torch.uint8)
        raw = values.view(torch.uint8)
        if scratch.device.type != "cuda":
            return cls(raw, finite, None, narrow)
        there = [scratch.staging(raw.numel()), scratch.staging(1)]
        there[0].copy_(raw, non_blocking=True)
        there[1].copy_(finite, non_blocking=True)
        done = torch.cuda.Event()
        done.record(torch.cuda.current_stream(scratch.device))
        return cls(there[0], there[1], done, narrow)

    def result(self) -> tuple[Bytes, bool]:
        """Wait for the bytes; return them, and whether they are finite."""
        if self.done:
            self.done.synchronize()
        if self.narrow:
            raw = encode(self.raw.numpy().view(np.float32), self.narrow)
            return raw, all_finite(raw, self.narrow)
        return self.raw.numpy(), bool(self.finite.item())


class _DeviceStatistics:
    """What data says about one tensor, on a device; see `Statistics`."""

    def __init__(self, host: Statistics, device: torch.device) -> None:
        self._host, self._device = host, device

    def read(self, start: int, stop: int) -> Floats:
        """Return elements `start` to `stop` of every model's, flattened, `[M, N]`."""
        return _floats(torch.from_numpy(self._host.read(start, stop)).to(self._device))


def _floats(tensor: torch.Tensor) -> Floats:
    """Return a tensor as what methods take for a numpy array."""
    return cast(Floats, DeviceArray(tensor, np.float32))


def _torch(dtype: DType) -> torch.dtype:
    return getattr(torch, dtype.torch)
