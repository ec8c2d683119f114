"""Read the inputs of one output tensor slice by slice, and merge them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache, cached_property
from itertools import dropwhile, islice
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np

from toolkit.checkpoints.deltas import CHUNK, chunks
from toolkit.checkpoints.dtypes import Bytes, Floats, all_finite, encode
from toolkit.merge.method import Method
from toolkit.merge.statistics.files import Statistics

if TYPE_CHECKING:
    from toolkit.merge.job import Job
    from toolkit.merge.plan import Plan


class Scratch:
    """Buffers of one thread, kept from tensor to tensor: a slice of the base and one of every model."""

    def __init__(self) -> None:
        _keep_freed_memory()
        self._base = np.empty(CHUNK, np.float32)
        self._stack = np.empty(0, np.float32)

    def base(self, size: int) -> Floats:
        """Return room for `size` elements of the base."""
        if size > len(self._base):
            self._base = np.empty(size, np.float32)
        return self._base[:size]

    def stack(self, models: int, size: int) -> Floats:
        """Return room for `size` elements of every model, `[models, size]`."""
        if models * size > len(self._stack):
            self._stack = np.empty(models * max(size, CHUNK), np.float32)
        return self._stack[: models * size].reshape(models, size)

    def open(self, job: Job, method: Method, surveyed: Any = None, statistics: Statistics | None = None) -> Stream:
        """Return a tensor as its method takes it, in these buffers; see `Stream`."""
        return Stream(job, method, self, surveyed, statistics)

    def shrink(self) -> None:
        """Give back what a large tensor needed."""
        self.__init__()


def scratch_of(plan: Plan) -> Scratch:
    """Return what a thread needs to run a plan, on the plan's device."""
    if plan.device is None:
        return Scratch()
    from toolkit.merge.device import open_device
    from toolkit.merge.device.stream import DeviceScratch  # which imports torch

    return DeviceScratch(open_device(plan.device))


@cache
def _keep_freed_memory() -> None:
    """Have glibc keep what is freed for the next slice, by freeing once what is larger than any of a slice's arrays.

    Otherwise each of them comes from the system anew, page by page, zeroed.
    """
    np.empty(64 * CHUNK, np.uint8)


class Stream:
    """One tensor of every input, as its method takes it; see `TensorStream`.

    Args:
        job: which tensors of which inputs.
        method: that merges them.
        scratch: buffers, which what is yielded lies in.
        surveyed: what the method's survey found for this tensor.
        statistics: what was measured on data for this tensor.
    """

    def __init__(
        self,
        job: Job,
        method: Method,
        scratch: Scratch,
        surveyed: Any = None,
        statistics: Statistics | None = None,
    ) -> None:
        self.job, self.method, self.scratch = job, method, scratch
        self.surveyed, self.statistics = surveyed, statistics
        self.name, self.shape, self.count = job.tensor.name, job.tensor.shape, job.tensor.count
        self.num_models = len(job.sources)
        self.is_delta = job.base is not None
        self._finite: Any = True

    @property
    def inputs_finite(self) -> bool:
        """Whether no NaN or infinity was met in the inputs of what was merged that the result may not show."""
        places = [source.place for source in self.job.sources]
        return bool(self._finite) and not any(place.checkpoint.hides_non_finite(place.name) for place in places)

    def ranges(self) -> Iterator[tuple[int, int]]:
        """Yield the slices that the tensor is read in."""
        return chunks(self.shape, whole_rows=self.method.scope == "row")

    def stacked(self, every: int = 1, begin: int = 0) -> Iterator[tuple[int, Floats]]:
        """Yield `(start, [M, N])` for all inputs, of each `every`-th slice from the one at `begin` on."""
        ranges = dropwhile(lambda slice_: slice_[1] <= begin, self.ranges()) if begin else self.ranges()
        for start, stop in islice(ranges, 0, None, every):
            x = self.scratch.stack(self.num_models, stop - start)
            self._read_all(start, stop, x)
            yield start, x

    def merged(self) -> Iterator[tuple[int, Floats]]:
        """Yield `(start, [N])`, the merged weights before they are rounded."""
        for start, stop in self.ranges():
            yield start, self.merged_slice(start, stop)
        if self.method.scope == "tensor":
            self.scratch.shrink()

    def merged_slice(self, start: int, stop: int) -> Floats:
        """Return elements `start` to `stop` of the merged weights, `[N]`, which are overwritten by the next slice."""
        if self.method.scope == "tensor":
            return self._on_base(self._whole[start:stop].copy(), self._read_base(start, stop))
        first, last = (start, stop) if self.method.scope == "element" else self._rows_around(start, stop)
        state = self.state  # before the buffer is taken: finding it uses the same one
        x = self.scratch.stack(self.num_models, last - first)
        self._read_all(first, last, x)
        self._look_through(x)
        base = self.scratch.base(last - first) if self.is_delta else None
        return self._on_base(self._combine(x, state, first), base)[start - first : stop - first]

    def encoded(self) -> Iterator[tuple[int, Bytes, bool]]:
        """Yield `(start, bytes, finite)`: the merged weights as they are stored, and whether they are finite."""
        dtype = self.job.tensor.dtype
        for start, merged in self.merged():
            raw = encode(merged, dtype)
            yield start, raw, all_finite(raw, dtype)

    def encoded_slice(self, start: int, stop: int) -> Bytes:
        """Return elements `start` to `stop`, one of the `ranges`, of the merged weights as they are stored."""
        return encode(self.merged_slice(start, stop), self.job.tensor.dtype)

    def _rows_around(self, start: int, stop: int) -> tuple[int, int]:
        """Return the smallest range of whole rows that holds a slice."""
        row = max(1, self.shape[-1] if self.shape else 1)
        return start // row * row, -(-stop // row) * row

    @cached_property
    def state(self) -> Any:
        """What the method must know of the whole tensor first."""
        return self.method.prepare(self, self.job.params) if self.method.prepare else None

    @cached_property
    def _whole(self) -> Floats:
        """The merged deltas or weights of the whole tensor, `[count]`."""
        state = self.state
        x = self.scratch.stack(self.num_models, prod(self.shape))
        for start, stop in self.ranges():
            self._read_all(start, stop, x[:, start:stop])
        self._look_through(x)
        return self._combine(x, state, 0)

    def _combine(self, x: Floats, state: object, start: int) -> Floats:
        """Run the method on `x` `[M, N]` in the shape that its scope promises."""
        if self.method.scope == "tensor":
            x = x.reshape(self.num_models, *self.shape)
        elif self.method.scope == "row":
            x = x.reshape(self.num_models, -1, self.shape[-1] if self.shape else 1)
        return self.method.combine(x, self.job.params, state, start).reshape(-1)

    def _look_through(self, x: Floats) -> None:
        """Notice NaN and infinity in `x` `[M, N]` that the result may not show."""
        if not self.method.uses_all:
            self._finite = self._finite and np.isfinite(x).all()

    def _read_all(self, start: int, stop: int, x: Floats) -> None:
        base = self._read_base(start, stop)
        for index in range(self.num_models):
            self._read(index, start, stop, base, x[index])

    def _read_base(self, start: int, stop: int) -> Floats | None:
        if not self.is_delta:
            return None
        assert self.job.base is not None
        values = self.scratch.base(stop - start)
        self.job.base.read(start, stop, values)
        return values

    def _read(self, index: int, start: int, stop: int, base: Floats | None, out: Floats) -> None:
        source = self.job.sources[index]
        if base is None:
            source.place.read(start, stop, out)
        elif source.delta is None:
            source.place.read(start, stop, out)
            np.subtract(out, base, out=out)
        elif source.delta.touches(source.place.name):
            source.delta.read(source.place.name, start, stop, base, out)
        else:
            out.fill(0)

    @staticmethod
    def _on_base(merged: Floats, base: Floats | None) -> Floats:
        return merged if base is None else np.add(merged, base, out=merged)


def survey(plan: Plan, statistics: Mapping[str, Statistics] | None = None) -> Mapping[str, Any]:
    """Return for each merged tensor what its method must know of the whole model first."""
    if plan.method.survey is None:
        return {}
    jobs = [job for job in plan.jobs if job.action == "merge"]
    scratch = scratch_of(plan)
    known = statistics or {}
    streams = [scratch.open(job, plan.method, statistics=known.get(job.tensor.name)) for job in jobs]
    found = plan.method.survey([(stream, job.params) for stream, job in zip(streams, jobs, strict=True)])
    return {job.tensor.name: state for job, state in zip(jobs, found, strict=True)}
