"""The task vectors of a learned merge, read from disk slice by slice as a merge reads them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from toolkit.checkpoints.dtypes import Floats
from toolkit.checkpoints.reader import Checkpoint
from toolkit.errors import Problem, SpecError
from toolkit.merge.ops import agree_on_signs, weighted_sum
from toolkit.merge.plan import Job, make_plan
from toolkit.merge.stream import Scratch, Stream, survey

Slice = tuple[int, Floats, Floats]
"""First element, the base's values `[N]`, and those of every task vector `[M, N]`."""


class TaskVectors:
    """What fine-tunes changed of their base, in the order of the spec.

    Args:
        base: folder, hub id or transformers model.
        models: fine-tunes by name: whatever a merge takes as a model.
        density: where given, task vectors are trimmed and agree in sign, as in TIES, which keeps this share of each.
        keep: bytes of them to hold in memory once they have been read.

    Attributes:
        template: method, base and parameters of the merge whose weights are the coefficients.
        jobs: of the tensors that some model changes, by name.

    Raises:
        SpecError: models that cannot be read, or do not fit together.
    """

    def __init__(
        self, base: object, models: Mapping[str, object], *, density: float | None = None, keep: int = 0
    ) -> None:
        self.names, self.sources = list(models), list(models.values())
        self.template = _template(base, density)
        try:
            self.plan = make_plan(self.template | {"models": [{"model": model} for model in models.values()]})
        except SpecError as error:
            raise SpecError([_named(problem, self.names) for problem in error.problems]) from None
        self.jobs = {job.tensor.name: job for job in self.plan.jobs if job.action == "merge"}
        self.density, self.keep = density, keep
        self._scratch = Scratch()
        self._surveyed = survey(self.plan) if density is not None else {}
        self._states: dict[str, Any] = {}
        self._kept: dict[str, list[Slice]] = {}

    @property
    def base(self) -> Checkpoint:
        """The base."""
        assert self.plan.inputs.base is not None
        return self.plan.inputs.base

    @property
    def read_bytes(self) -> int:
        """Bytes that one pass over all of them reads."""
        return sum(job.read_bytes for job in self.jobs.values())

    def slices(self, name: str) -> Iterator[Slice]:
        """Yield a tensor slice by slice; the arrays are overwritten by the next one and must not be written to."""
        if name in self._kept:
            yield from self._kept[name]
            return
        job = self.jobs[name]
        needed = 4 * (len(self.names) + 1) * job.tensor.count
        if needed <= self.keep:
            self.keep -= needed
            self._kept[name] = [(start, base.copy(), x.copy()) for start, base, x in self._read(job)]
            yield from self._kept[name]
        else:
            yield from self._read(job)

    def merged(self, name: str, coefficients: Sequence[float]) -> Iterator[tuple[int, Floats]]:
        """Yield `(start, [N])`: the base and the sum of the task vectors, with the arithmetic of the merge itself."""
        for start, base, x in self.slices(name):
            merged = weighted_sum(x.copy(), coefficients)
            yield start, np.add(merged, base, out=merged)

    def _read(self, job: Job) -> Iterator[Slice]:
        stream = Stream(job, self.plan.method, self._scratch, self._surveyed.get(job.tensor.name))
        if self.density is not None and job.tensor.name not in self._states:
            self._states[job.tensor.name] = stream.state
        assert job.base is not None
        for start, x in stream.stacked():
            base = np.empty(x.shape[1], np.float32)
            job.base.read(start, start + len(base), base)
            if self.density is not None:
                cuts, zero = self._states[job.tensor.name]
                _trim(x, cuts, zero, start)
            yield start, base, x

    def close(self) -> None:
        """Close all files."""
        self.plan.inputs.close()


def _template(base: object, density: float | None) -> dict[str, Any]:
    if density is None:
        return {"merge_method": "task_arithmetic", "base_model": base}
    # The sum of what agrees, not its mean, as in AdaMerging++.
    parameters = {"preset": "paper", "density": density, "normalize": False}
    return {"merge_method": "ties", "base_model": base, "parameters": parameters}


def _trim(x: Floats, cuts: Any, zero: float, start: int) -> None:
    """Set to 0 what TIES leaves out of each task vector `[M, N]`: the small elements, and those of the other sign."""
    for row, cut in zip(x, cuts, strict=True):
        cut.drop(row, start)
    elected = agree_on_signs(x.copy(), [1.0] * len(x), vote="total", zero=zero, divisor="none")
    for row in x:
        np.multiply(row, row * elected > 0, out=row)


def _named(problem: Problem, names: list[str]) -> Problem:
    """Turn a key path of the merge into one of the learned merge, whose models have names."""
    index, sep, _ = problem.where.removeprefix("models[").partition("]")
    if problem.where.startswith("models[") and sep:
        return Problem(f"models.{names[int(index)]}", problem.message)
    return problem
