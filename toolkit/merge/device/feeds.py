"""Where the bytes of each input of a tensor come from, read straight into the memory that they are uploaded from."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from toolkit.checkpoints.deltas import DenseDelta
from toolkit.checkpoints.dtypes import DTYPES, Bytes, DType, Floats
from toolkit.checkpoints.reader import FolderCheckpoint
from toolkit.errors import CheckpointError
from toolkit.merge.plan import Job, Place, Source

Read = Callable[[int, int, Bytes], None]
"""Fills bytes with the elements `start` to `stop`, flattened."""


@dataclass(frozen=True)
class Feed:
    """How one input of a tensor is read.

    Attributes:
        read: fills bytes of `dtype`; `None` where all is 0.
        dtype: of the bytes.
        is_delta: whether they are a change of the base already.
    """

    read: Read | None
    dtype: DType = DTYPES["F32"]
    is_delta: bool = False


class Files:
    """Files that are read, each opened once; closed when nothing refers to them any more."""

    def __init__(self) -> None:
        self._descriptors: dict[Path, int] = {}
        self._lock = threading.Lock()
        weakref.finalize(self, _close, self._descriptors)

    def read(self, file: Path, offset: int, into: Bytes) -> None:
        """Fill `into` with the bytes at an offset of a file.

        Raises:
            CheckpointError: the file ends before.
        """
        with self._lock:
            if file not in self._descriptors:
                self._descriptors[file] = os.open(file, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
            descriptor = self._descriptors[file]
        left = memoryview(into.data)
        while left:
            done = os.preadv(descriptor, [left], offset)
            if not done:
                raise CheckpointError(f"{file}: became shorter while it was read")
            left, offset = left[done:], offset + done


def _close(descriptors: dict[Path, int]) -> None:
    for descriptor in descriptors.values():
        os.close(descriptor)


def feed_of(place: Place, files: Files, step: int) -> Feed:
    """Return how weights are read: as stored; as float32 where they are computed, `step` elements at a time."""
    checkpoint, info = place.checkpoint, place.info
    if not place.is_stored or not info.dtype.floating:
        return Feed(_as_floats(place.read, step))
    if type(checkpoint) is FolderCheckpoint and info.file is not None:
        file = info.file

        def read(start: int, stop: int, into: Bytes) -> None:
            files.read(file, info.offset + info.dtype.nbytes(start), into)

        return Feed(read, info.dtype)
    return Feed(lambda start, stop, into: np.copyto(into, place.read_raw(start, stop)), info.dtype)


def feeds_of(job: Job, files: Files, step: int) -> list[Feed]:
    """Return how the sources of a tensor are read, and last its base where deltas are wanted."""
    base = job.base
    if base is None:
        return [feed_of(source.place, files, step) for source in job.sources]
    return [_delta_feed(source, base, files, step) for source in job.sources] + [feed_of(base, files, step)]


def _delta_feed(source: Source, base: Place, files: Files, step: int) -> Feed:
    delta, name = source.delta, source.place.name
    if delta is None:
        return feed_of(source.place, files, step)
    if not delta.touches(name):
        return Feed(None, is_delta=True)
    if isinstance(delta, DenseDelta):
        return feed_of(Place(delta.tuned, name), files, step)

    def read(start: int, stop: int, out: Floats) -> None:
        own = np.empty(stop - start, np.float32)
        base.read(start, stop, own)
        delta.read(name, start, stop, own, out)

    return Feed(_as_floats(read, step), is_delta=True)


def _as_floats(read: Callable[[int, int, Floats], None], step: int) -> Read:
    """Return what reads a long slice in the short ones that a merge on the CPU reads, on which its bytes depend."""

    def read_all(start: int, stop: int, into: Bytes) -> None:
        values = into.view(np.float32)
        for first in range(start, stop, step):
            last = min(first + step, stop)
            read(first, last, values[first - start : last - start])

    return read_all


def ranges(count: int, size: int) -> Iterator[tuple[int, int]]:
    """Cut `count` elements into slices of a size."""
    return ((start, min(start + size, count)) for start in range(0, count, size))


def read_bytes(feeds: Sequence[Feed], count: int) -> int:
    """Return the bytes that are uploaded of a slice of `count` elements of all inputs."""
    return sum(feed.dtype.nbytes(count) for feed in feeds if feed.read)
