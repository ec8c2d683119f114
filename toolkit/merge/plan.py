"""Plan a merge from headers alone: every output tensor, its inputs, its parameters, the bytes to move."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from toolkit import specs
from toolkit.checkpoints.adapters import WEIGHTS
from toolkit.checkpoints.dtypes import DType, by_torch_name
from toolkit.checkpoints.headers import TensorInfo
from toolkit.checkpoints.layout import Layout, is_head, role_of
from toolkit.checkpoints.reader import Checkpoint
from toolkit.checkpoints.writer import SHARD_BYTES, plan_shards
from toolkit.errors import Problem, UnsupportedError
from toolkit.merge.inputs import Inputs, open_inputs
from toolkit.merge.method import Method, MethodParams, load_method
from toolkit.merge.parameters import Resolver, check
from toolkit.merge.spec import MergeSpec
from toolkit.tables import Table, human_bytes, human_count


@dataclass(frozen=True)
class Job:
    """What is done for one output tensor.

    Attributes:
        tensor: name, dtype and shape of the output.
        action: `merge`; or `copy` the donor's bytes, where no input changes the tensor or it is not of numbers
            that can be averaged.
        params: the method's parameters for this tensor; `None` for a copy.
        read_bytes: what one pass over the inputs reads.
    """

    tensor: TensorInfo
    action: Literal["merge", "copy"]
    params: MethodParams | None
    read_bytes: int


@dataclass(frozen=True)
class Plan:
    """A checked merge: nothing of it can fail but the reading and the writing.

    Attributes:
        spec: what was asked for.
        method: that does it.
        inputs: opened models.
        jobs: one per output tensor, in the donor's order.
        shards: tensors of each output file.
        dtype: of all floating-point outputs, or `None` where each keeps the donor's.
    """

    spec: MergeSpec
    method: Method
    inputs: Inputs
    jobs: list[Job]
    shards: dict[str, list[TensorInfo]]
    dtype: DType | None

    @property
    def unties_head(self) -> bool:
        """Whether the output has a head of its own although the donor's config ties it."""
        return self.inputs.donor.ties_head and any(is_head(job.tensor.name) for job in self.jobs)

    @property
    def read_bytes(self) -> int:
        """Bytes that one pass over all inputs reads."""
        return sum(job.read_bytes for job in self.jobs)

    @property
    def write_bytes(self) -> int:
        """Bytes of the output's weights."""
        return sum(job.tensor.nbytes for job in self.jobs)

    def fingerprint(self) -> str:
        """Return an identity that changes when the spec, the inputs' files or the output's layout do."""
        what = {
            "spec": self.spec.model_dump(mode="json", by_alias=True),
            "files": sorted(_identity(file) for file in _files(self.inputs)),
            "shards": {k: [(t.name, t.dtype.name, t.shape) for t in v] for k, v in self.shards.items()},
        }
        return hashlib.blake2b(json.dumps(what, sort_keys=True).encode(), digest_size=16).hexdigest()

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as JSON can hold it."""
        return {
            "method": self.method.name,
            "read_bytes": self.read_bytes,
            "write_bytes": self.write_bytes,
            "shards": {name: sum(t.nbytes for t in tensors) for name, tensors in self.shards.items()},
            "tensors": [
                {
                    "name": job.tensor.name,
                    "shape": list(job.tensor.shape),
                    "dtype": job.tensor.dtype.torch,
                    "action": job.action,
                    "parameters": job.params.model_dump(by_alias=True) if job.params else None,
                }
                for job in self.jobs
            ],
        }

    def table(self) -> Table:
        """Return one row per kind of tensor that is treated alike."""
        groups: dict[tuple[str, ...], list[Job]] = {}
        for job in self.jobs:
            groups.setdefault((role_of(job.tensor.name), job.action, _params_text(job.params)), []).append(job)
        rows = [
            [
                role,
                len(jobs),
                human_count(sum(j.tensor.count for j in jobs)),
                self.method.name if action == "merge" else action,
                text,
                human_bytes(sum(j.read_bytes for j in jobs)),
                human_bytes(sum(j.tensor.nbytes for j in jobs)),
            ]
            for (role, action, text), jobs in groups.items()
        ]
        total = [human_bytes(self.read_bytes), human_bytes(self.write_bytes)]
        rows.append(["all", len(self.jobs), human_count(sum(j.tensor.count for j in self.jobs)), "", "", *total])
        return Table(("role", "tensors", "elements", "method", "parameters", "read", "write"), rows, "Plan")

    def _repr_html_(self) -> str:
        return self.table()._repr_html_()


def make_plan(
    spec: specs.Source | MergeSpec,
    *,
    overrides: Sequence[str] = (),
    smoke: bool = False,
    allow_pickle: bool = False,
    shard_bytes: int = SHARD_BYTES,
) -> Plan:
    """Open the inputs' headers and plan every output tensor; see `merge` for the arguments.

    Raises:
        SpecError: all that is wrong with the spec and with how its models fit together.
    """
    loaded = specs.load(spec, MergeSpec, overrides=overrides, smoke=smoke)
    try:
        method = load_method(loaded.merge_method)
    except UnsupportedError as error:
        raise loaded.error([Problem("merge_method", str(error))]) from None
    found = check(loaded, method)
    dtype, wrong = _output_dtype(loaded)
    inputs, more = open_inputs(loaded, method, allow_pickle=allow_pickle)
    found += wrong + more
    jobs: list[Job] = []
    if not found:
        jobs, found = _jobs(loaded, method, inputs, dtype)
    if found:
        inputs.close()
        raise loaded.error(found)
    return Plan(loaded, method, inputs, jobs, plan_shards([job.tensor for job in jobs], shard_bytes), dtype)


def _output_dtype(spec: MergeSpec) -> tuple[DType | None, list[Problem]]:
    key = "out_dtype" if spec.out_dtype else "dtype"
    name = spec.out_dtype or spec.dtype
    if name is None:
        return None, []
    try:
        dtype = by_torch_name(name)
    except UnsupportedError as error:
        return None, [Problem(key, str(error))]
    if not dtype.floating:
        return None, [Problem(key, f"{name} cannot hold weights")]
    return dtype, []


def _jobs(spec: MergeSpec, method: Method, inputs: Inputs, dtype: DType | None) -> tuple[list[Job], list[Problem]]:
    donor = inputs.donor
    names = _output_names(inputs)
    found = _misfits(spec, inputs, names)
    if found:
        return [], found
    resolver = Resolver(spec, method, Layout(names), [m.position for m in inputs.models])
    jobs: list[Job] = []
    for name in names:
        info = donor.info(name)
        out = TensorInfo(name, dtype if dtype and info.dtype.floating else info.dtype, info.shape)
        params = resolver.resolve(name)
        if isinstance(params, list):
            found += [p for p in params if p not in found]
            continue
        changed = any(m.delta is None or m.delta.touches(name) for m in inputs.models)
        if info.dtype.floating and info.count and (changed or not method.idempotent(params)):
            jobs.append(Job(out, "merge", params, _read_bytes(inputs, name)))
        else:
            jobs.append(Job(out, "copy", None, info.nbytes))
    return jobs, found


def _read_bytes(inputs: Inputs, name: str) -> int:
    models = sum(m.delta.nbytes(name) if m.delta else m.weights.info(name).nbytes for m in inputs.models)
    return models + (inputs.base.info(name).nbytes if inputs.base else 0)


def _output_names(inputs: Inputs) -> list[str]:
    """Name the output's tensors: the donor's, and an output head where any model has one of its own.

    A head that a model stores although its config ties it is a copy of the embedding, and left out.
    """
    models = [inputs.donor, *(m.weights for m in inputs.models)]
    apart = {name for m in models if not m.ties_head for name in m.tensors if is_head(name)}
    names = [name for name in inputs.donor.tensors if not is_head(name) or name in apart]
    return names + sorted(name for name in apart if name not in names)


def _misfits(spec: MergeSpec, inputs: Inputs, names: Sequence[str]) -> list[Problem]:
    """Find tensors that a model lacks, has besides, or has in another shape than the donor."""
    donor = inputs.donor
    found: list[Problem] = []
    for model in inputs.models:
        where = f"models[{model.position}].model"
        lacking = [n for n in names if not model.weights.has(n)]
        extra = [n for n in model.weights.tensors if n not in names and not is_head(n)]
        both = [n for n in names if n not in lacking]
        shapes = [n for n in both if model.weights.info(n).shape != donor.info(n).shape]
        if lacking:
            found.append(Problem(where, f"lacks {_some(lacking)} that {donor.source} has"))
        if extra:
            found.append(Problem(where, f"has {_some(extra)} that {donor.source} does not have"))
        if shapes:
            given, wanted = model.weights.info(shapes[0]).shape, donor.info(shapes[0]).shape
            found.append(Problem(where, f"{_some(shapes)}: shape {list(given)}, but {list(wanted)} in {donor.source}"))
    return found


def _some(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more tensors"


def _params_text(params: MethodParams | None) -> str:
    if params is None:
        return ""

    def text(value: Any) -> str:
        if isinstance(value, tuple):
            return ", ".join(text(v) for v in value)
        return f"{value:g}" if isinstance(value, float) else str(value).lower()

    return "; ".join(f"{key} {text(value)}" for key, value in params.model_dump(by_alias=True).items())


def _files(inputs: Inputs) -> Iterator[str]:
    checkpoints: list[Checkpoint] = [m.weights for m in inputs.models] + ([inputs.base] if inputs.base else [])
    for checkpoint in checkpoints:
        yield from {str(t.file) for t in checkpoint.tensors.values() if t.file}
    for model in inputs.models:
        if model.adapter:
            yield str(model.adapter.folder / WEIGHTS)


def _identity(file: str) -> tuple[str, int, int]:
    status = os.stat(file)
    return file, status.st_size, status.st_mtime_ns
