"""The result of a merge as a model: nothing is written, every slice is computed when it is read."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from typing_extensions import override

from toolkit.checkpoints.dtypes import Bytes, Floats, decode, encode
from toolkit.checkpoints.reader import Checkpoint
from toolkit.merge.job import Job
from toolkit.merge.plan import Plan
from toolkit.merge.stream import Scratch, Stream, survey


class MergedCheckpoint(Checkpoint):
    """A merge inside another one.

    Its values are those that the merge would have written as float32, or, where its spec names a dtype, those rounded
    to it.

    Args:
        plan: of the merge.
        source: what messages call it.
    """

    def __init__(self, plan: Plan, source: str) -> None:
        self.plan, self.source = plan, source
        donor = plan.inputs.donor
        self.config, self.folder = dict(donor.config) | dict(plan.config), donor.folder
        self.tensors = {job.tensor.name: job.tensor for job in plan.jobs}
        self._jobs = {job.tensor.name: job for job in plan.jobs}
        self._local, self._lock = threading.local(), threading.Lock()
        self._surveyed: Mapping[str, Any] | None = None
        self._hidden: set[str] = set()

    def job(self, name: str) -> Job:
        """Return what is done for a tensor."""
        return self._jobs[self._stored(name)]

    @override
    def is_stored(self, name: str) -> bool:
        job = self.job(name)
        return job.action == "copy" and job.donor.info.dtype == job.tensor.dtype and job.donor.is_stored

    @override
    def read_raw(self, name: str, start: int = 0, stop: int | None = None) -> Bytes:
        job = self.job(name)
        if self.is_stored(name):
            return job.donor.checkpoint.read_raw(job.donor.name, start, stop)
        values = np.empty((job.tensor.count if stop is None else stop) - start, np.float32)
        self.read(name, start, start + len(values), values)
        return encode(values, job.tensor.dtype)

    @override
    @np.errstate(invalid="ignore", over="ignore")  # as in a merge of its own
    def read(self, name: str, start: int, stop: int, out: Floats) -> None:
        job = self.job(name)
        if job.action == "copy":
            job.donor.read(start, stop, out)
        else:
            stream = self._stream(job)
            np.copyto(out, stream.merged_slice(start, stop))
            if not stream.inputs_finite:
                self._hidden.add(job.tensor.name)
        if self.plan.dtype:
            decode(encode(out.copy(), self.plan.dtype), self.plan.dtype, out)

    def _stream(self, job: Job) -> Stream:
        """Return this thread's stream of a tensor; it keeps what the method must know of the whole tensor first."""
        if self._surveyed is None:
            with self._lock:
                self._surveyed = survey(self.plan) if self._surveyed is None else self._surveyed
        stream: Stream | None = getattr(self._local, "stream", None)
        if stream is None or stream.job is not job:
            scratch = stream.scratch if stream else Scratch()
            stream = Stream(job, self.plan.method, scratch, self._surveyed.get(job.tensor.name))
            self._local.stream = stream
        return stream

    @override
    def hides_non_finite(self, name: str) -> bool:
        return self._stored(name) in self._hidden

    @override
    def read_bytes(self, name: str) -> int:
        return self.job(name).read_bytes

    @override
    def files(self) -> set[Path]:
        return self.plan.inputs.files()

    @property
    @override
    def buffer_bytes(self) -> int:
        return self.plan.memory_bytes

    @override
    def close(self) -> None:
        self.plan.inputs.close()
