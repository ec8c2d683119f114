"""What several fine-tunes changed of their base, read tensor by tensor as a merge reads its inputs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

import numpy as np

from toolkit.checkpoints.dtypes import DTYPES, DType, Floats
from toolkit.checkpoints.reader import Checkpoint
from toolkit.errors import CheckpointError, UnsupportedError
from toolkit.merge.job import Job, Place
from toolkit.merge.plan import make_plan
from toolkit.merge.stream import Scratch, Stream
from toolkit.progress import Progress

Key = tuple[str, str]
"""A tensor's name and a fine-tune's."""


class Changes:
    """The opened models of an extraction.

    Args:
        base: folder, hub id or transformers model.
        tuned: fine-tunes by name: whatever a merge takes as a model.
        allow_pickle: also read pickled checkpoints.

    Attributes:
        tensors: all of the base's, by name, and output heads that a fine-tune has besides.
        jobs: those of numbers that a fine-tune may have changed.
        norms: Frobenius norm of each change, of those that are not zero; filled in by `survey`.

    Raises:
        SpecError: models that cannot be read, or do not fit together.
    """

    def __init__(self, base: object, tuned: Mapping[str, object], *, allow_pickle: bool = False) -> None:
        models = [{"model": model} for model in tuned.values()]
        spec = {"merge_method": "task_arithmetic", "base_model": base, "models": models}
        self.plan = make_plan(spec, allow_pickle=allow_pickle)
        self.tasks = list(tuned)
        self.tensors: dict[str, Job] = {job.tensor.name: job for job in self.plan.jobs}
        self.jobs = {name: job for name, job in self.tensors.items() if job.action == "merge"}
        self.norms: dict[Key, float] = {}
        self._scratch = Scratch()

    @property
    def base(self) -> Checkpoint:
        """The base."""
        assert self.plan.inputs.base is not None
        return self.plan.inputs.base

    @property
    def sources(self) -> dict[str, str]:
        """What the user called each fine-tune, by its name."""
        return {task: model.weights.source for task, model in zip(self.tasks, self.plan.inputs.models, strict=True)}

    @property
    def nbytes(self) -> int:
        """Bytes of the fine-tunes as they are stored."""
        models = self.plan.inputs.models
        return sum(model.adapter.nbytes if model.adapter else model.weights.nbytes for model in models)

    @property
    def read_bytes(self) -> int:
        """Bytes that one pass over all tensors reads."""
        return sum(job.read_bytes for job in self.jobs.values())

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor."""
        return self.tensors[name].tensor.shape

    def changed(self, name: str) -> list[str]:
        """Name the fine-tunes that changed a tensor."""
        return [task for task in self.tasks if (name, task) in self.norms]

    def survey(self, progress: Progress) -> None:
        """Measure every change.

        Raises:
            CheckpointError: a change that is not finite.
            UnsupportedError: a tensor that is not of floating-point numbers was changed.
        """
        for job in self.tensors.values():
            if job.action == "copy" and not job.tensor.dtype.floating:
                self._check_equal(job.tensor.name)
        for name, job in self.jobs.items():
            squares = np.zeros(len(self.tasks))
            for _, x in self.slices(name):
                squares += [float(np.square(row, dtype=np.float64).sum()) for row in x]
            for task, square in zip(self.tasks, squares, strict=True):
                if not np.isfinite(square):
                    raise CheckpointError(f"{self.sources[task]}: {name} holds NaN or infinity, or its base does")
                if square:
                    self.norms[name, task] = float(np.sqrt(square))
            progress.advance(job.read_bytes)

    def _check_equal(self, name: str) -> None:
        own = self.base.read_raw(name)
        for model in self.plan.inputs.models:
            if not np.array_equal(own, model.weights.read_raw(name)):
                dtype = self.base.info(name).dtype.name
                raise UnsupportedError(f"{model.weights.source}: changes {name}, whose dtype {dtype} has no difference")

    def slices(self, name: str) -> Iterator[tuple[int, Floats]]:
        """Yield `(start, [T, N])`, the changes of all fine-tunes, in memory that the next slice overwrites."""
        yield from Stream(self.jobs[name], self.plan.method, self._scratch).stacked()

    def slices_of(self, name: str, task: str) -> Iterator[tuple[int, Floats]]:
        """Yield `(start, [N])`, the change of one fine-tune, likewise."""
        job, index = self.jobs[name], self.tasks.index(task)
        alone = replace(job, sources=(job.sources[index],))
        yield from ((start, x[0]) for start, x in Stream(alone, self.plan.method, self._scratch).stacked())

    def matrix(self, name: str, task: str) -> Floats:
        """Return the whole change of one fine-tune, float32, in the tensor's shape."""
        whole = np.empty(self.jobs[name].tensor.count, np.float32)
        for start, x in self.slices_of(name, task):
            whole[start : start + len(x)] = x
        return whole.reshape(self.shape(name))

    def tuned(self, name: str, task: str) -> Place:
        """Return where a fine-tune's own values are."""
        job = self.tensors[name]
        return job.sources[self.tasks.index(task)].place if job.sources else job.donor

    def whole_dtype(self, name: str, task: str) -> DType:
        """Return the dtype that holds a fine-tune's own values without loss."""
        place = self.tuned(name, task)
        try:
            place.read_raw(0, 1)
        except UnsupportedError:  # computed from a base and a change of it
            return DTYPES["F32"]
        return place.info.dtype

    def close(self) -> None:
        """Close all files."""
        self.plan.inputs.close()
