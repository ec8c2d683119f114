"""Plan a merge from headers alone: every output tensor, its inputs, its parameters, the bytes to move."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from toolkit import specs
from toolkit.checkpoints.deltas import CHUNK
from toolkit.checkpoints.dtypes import DType, by_torch_name
from toolkit.checkpoints.headers import TensorInfo
from toolkit.checkpoints.layout import role_of
from toolkit.checkpoints.reader import Checkpoint
from toolkit.checkpoints.writer import SHARD_BYTES, plan_shards
from toolkit.errors import Problem, SpecError, UnsupportedError
from toolkit.merge.arrange import arrange, output_config
from toolkit.merge.assemble import Piece
from toolkit.merge.data import check_data, data_files
from toolkit.merge.device import DEPTH, SLICE, find_device
from toolkit.merge.groups import groups_of
from toolkit.merge.inputs import GroupInputs, Input, Inputs, open_inputs
from toolkit.merge.job import Job, Place, Source
from toolkit.merge.method import Method, MethodParams, load_method
from toolkit.merge.parameters import Resolver, check
from toolkit.merge.spec import MergeSpec
from toolkit.merge.templates import Template, chat_template
from toolkit.merge.vocabulary import Vocabulary
from toolkit.tables import Table, human_bytes, human_count


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
        config: what differs in the output's `config.json` from the donor's.
        vocabulary: of the output; by default the donor's.
        template: chat template of the output; by default the tokenizer's.
        device: that merges; `None` is the CPU, without torch.
    """

    spec: MergeSpec
    method: Method
    inputs: Inputs
    jobs: list[Job]
    shards: dict[str, list[TensorInfo]]
    dtype: DType | None
    config: Mapping[str, Any] = field(default_factory=dict)
    vocabulary: Vocabulary | None = None
    template: Template | None = None
    device: str | None = None

    @property
    def read_bytes(self) -> int:
        """Bytes that one pass over all inputs reads."""
        return sum(job.read_bytes for job in self.jobs)

    @property
    def write_bytes(self) -> int:
        """Bytes of the output's weights."""
        return sum(job.tensor.nbytes for job in self.jobs)

    @property
    def memory_bytes(self) -> int:
        """Bytes of buffers that one worker needs at most, besides what the interpreter and its libraries take."""
        merged = [job for job in self.jobs if job.action == "merge"]
        inside = {id(c): c.buffer_bytes for c in self.inputs.checkpoints}
        buffers = _staging if self.device else partial(_buffers, self.method)
        return max((buffers(job) for job in merged), default=CHUNK * 8) + sum(inside.values())

    @property
    def statistics_bytes(self) -> int:
        """Bytes of weights, and of gradients and their sums, that measuring the models on data holds at once."""
        copies = {None: 0, "fisher": 3}.get(self.method.statistics, 1)
        return 4 * copies * sum(t.count for t in self.inputs.donor.tensors.values())

    @property
    def donors(self) -> dict[str, str]:
        """Where the output's config, tokenizer and chat template come from."""
        donor = self.inputs.donor.source
        tokenizer = self.vocabulary.origin if self.vocabulary else donor
        template = self.template.origin if self.template else tokenizer
        return {"config": donor, "tokenizer": tokenizer, "chat template": template}

    @property
    def donors_text(self) -> str:
        """The same for a reader: `config of a; tokenizer, chat template of b`."""
        found: dict[str, list[str]] = {}
        for what, origin in self.donors.items():
            found.setdefault(origin, []).append(what)
        return "; ".join(f"{', '.join(whats)} of {origin}" for origin, whats in found.items())

    @property
    def added_tokens(self) -> Sequence[str]:
        """Tokens that the output's tokenizer has and the one that it comes from has not."""
        return self.vocabulary.added if self.vocabulary else ()

    def fingerprint(self) -> str:
        """Return an identity that changes when the spec, the inputs' files or the output's layout do."""
        what = {
            "spec": self.spec.model_dump(mode="json", by_alias=True),
            "files": sorted(_identity(file) for file in self.inputs.files() | data_files(self.spec)),
            "shards": {k: [(t.name, t.dtype.name, t.shape) for t in v] for k, v in self.shards.items()},
        } | ({"device": self.device} if self.device else {})
        return hashlib.blake2b(json.dumps(what, sort_keys=True).encode(), digest_size=16).hexdigest()

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as JSON can hold it."""
        return {
            "method": self.method.name,
            "read_bytes": self.read_bytes,
            "write_bytes": self.write_bytes,
            "memory_bytes": self.memory_bytes,
            "statistics_bytes": self.statistics_bytes,
            "donors": self.donors,
            "added_tokens": list(self.added_tokens),
            "shards": {name: sum(t.nbytes for t in tensors) for name, tensors in self.shards.items()},
            "tensors": [
                {
                    "name": job.tensor.name,
                    "shape": list(job.tensor.shape),
                    "dtype": job.tensor.dtype.torch,
                    "action": job.action,
                    "sources": [f"{s.place.checkpoint.source}:{s.place.name}" for s in job.sources],
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
        title = f"Plan; {self.donors_text}; buffers of {human_bytes(self.memory_bytes)} per worker"
        if self.statistics_bytes:
            title += f"; models are run on data first, in {human_bytes(self.statistics_bytes)} and what a run takes"
        return Table(("role", "tensors", "elements", "method", "parameters", "read", "write"), rows, title)

    def _repr_html_(self) -> str:
        return self.table()._repr_html_()


def make_plan(
    spec: specs.Source | MergeSpec,
    *,
    overrides: Sequence[str] = (),
    smoke: bool = False,
    allow_pickle: bool = False,
    shard_bytes: int = SHARD_BYTES,
    device: str = "cpu",
) -> Plan:
    """Open the inputs' headers and plan every output tensor; see `merge` for the arguments.

    Raises:
        SpecError: all that is wrong with the spec and with how its models fit together.
        UnsupportedError: there is no such device.
    """
    found_device = find_device(device)
    loaded = specs.load(spec, MergeSpec, overrides=overrides, smoke=smoke)
    method, unknown = _method(loaded)
    seeded = loaded.seed is not None and "seed" in method.shared
    groups = groups_of(loaded, {"seed": loaded.seed} if seeded else None)
    wrong = unknown or [*check(groups, method), *check_data(loaded, method)]
    if found_device and not method.on_device:
        wrong.append(Problem("merge_method", f"{method.name} runs on the CPU alone; leave out --device"))
    dtype, found = _output_dtype(loaded)
    nested = partial(open_merge, allow_pickle=allow_pickle)
    inputs, absent = open_inputs(groups, method, nested, allow_pickle=allow_pickle)
    try:
        arranged, misfits = arrange(loaded, inputs, whole=not absent)
        jobs, more = ([], []) if wrong else _jobs(method, arranged.inputs, arranged.pieces, dtype)
        template, faults = chat_template(loaded, inputs)
        problems = [*wrong, *found, *absent, *misfits, *more, *faults]
        if problems:
            raise loaded.error(problems)
    except BaseException:
        inputs.close()
        raise
    config = output_config(arranged, [job.tensor.name for job in jobs])
    shards = plan_shards([job.tensor for job in jobs], shard_bytes)
    vocabulary = arranged.vocabulary
    return Plan(loaded, method, arranged.inputs, jobs, shards, dtype, config, vocabulary, template, found_device)


def _method(spec: MergeSpec) -> tuple[Method, list[Problem]]:
    """Load the method; of an unknown one another stands in, so that what is wrong with the models is found as well."""
    try:
        return load_method(spec.merge_method), []
    except UnsupportedError as error:
        return load_method("linear"), [Problem("merge_method", str(error))]


def open_merge(spec: MergeSpec, where: str, *, allow_pickle: bool) -> Checkpoint:
    """Open a merge inside a merge.

    Raises:
        SpecError: with all that is wrong with it, at its key paths.
    """
    from toolkit.merge.nested import MergedCheckpoint  # it computes what is planned here

    for key in ("output", "tokenizer", "tokenizer_source", "chat_template"):
        if key in spec.model_fields_set:
            raise SpecError([Problem(key, "not of a merge inside a merge; give it to the outer one")])
    if spec.data or any(model.data for model in spec.models or ()):
        raise SpecError([Problem("data", "a merge inside a merge cannot be measured on data; write it out first")])
    plan = make_plan(spec, allow_pickle=allow_pickle)
    return MergedCheckpoint(plan, f"{where} ({plan.method.name} of {len(plan.inputs.models)})")


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


def _jobs(
    method: Method, inputs: Inputs, pieces: Sequence[Piece], dtype: DType | None
) -> tuple[list[Job], list[Problem]]:
    resolvers = {id(g): Resolver(method, g.group, [m.slot for m in g.models]) for g in inputs.groups}
    jobs: list[Job] = []
    found: list[Problem] = []
    for piece in pieces:
        donor = Place(*piece.donor)
        info = donor.info
        out = TensorInfo(piece.name, dtype if dtype and info.dtype.floating else info.dtype, info.shape)
        if piece.group is None:
            jobs.append(Job(out, "copy", donor))
            continue
        params = resolvers[id(piece.group)].resolve(piece.name, piece.depth)
        if isinstance(params, list):
            found += [p for p in params if p not in found]
            continue
        job = _job(method, piece.group, piece, out, donor, params)
        if isinstance(job, Problem):
            found += [job] if job not in found else []
        else:
            jobs.append(job)
    return jobs, found


def _job(
    method: Method, group: GroupInputs, piece: Piece, out: TensorInfo, donor: Place, params: MethodParams
) -> Job | Problem:
    base = Place(group.base, piece.base_name) if group.base else None
    deltas = method.takes_deltas(base is not None)
    if deltas and base and not (base.checkpoint.has(base.name) and base.info.shape == out.shape):
        return Problem("base_model", f"has no {base.name} of shape {list(out.shape)}")
    sources = [_source(model, name, base) for model, name in zip(group.models, piece.source_names, strict=True)]
    changed = base is None or any(source.changes for source in sources)
    if not out.dtype.floating or not out.count or not (changed or not method.idempotent(params)):
        return Job(out, "copy", donor)
    if not deltas:
        if method.prepare is None and method.coefficients(params, None) == [1.0]:
            return Job(out, "copy", sources[0].place)
        return Job(out, "merge", donor, tuple(Source(s.place, None) for s in sources), None, params)
    return Job(out, "merge", donor, tuple(sources), base, params)


def _source(model: Input, name: str, base: Place | None) -> Source:
    same = base is not None and base.name == name and name not in model.mapped
    return Source(Place(model.weights, name), model.delta if same else None)


def _buffers(method: Method, job: Job) -> int:
    models, shape, count = len(job.sources), job.tensor.shape, job.tensor.count
    if method.scope == "tensor":
        return 4 * (models + 1) * count + method.memory(shape, models)
    row = shape[-1] if shape and method.scope == "row" else 1
    return 4 * (models + 2) * max(CHUNK, row) + method.memory(shape, models)


def _staging(job: Job) -> int:
    """Return what waits on the host to go to a device or has come from one; all else is on the device."""
    infos = [source.place.info for source in job.sources] + ([job.base.info] if job.base else [])
    count = min(job.tensor.count, max(SLICE, CHUNK, job.tensor.shape[-1] if job.tensor.shape else 1))
    # Slices that are being read, that go up, that came down.
    return (DEPTH + 1) * sum(max(32, info.dtype.bits) // 8 * count for info in [*infos, job.tensor])


def _params_text(params: MethodParams | None) -> str:
    if params is None:
        return ""

    def text(value: Any) -> str:
        if isinstance(value, tuple):
            return ", ".join(text(v) for v in value)
        return f"{value:g}" if isinstance(value, float) else str(value).lower()

    return "; ".join(f"{key} {text(value)}" for key, value in params.model_dump(by_alias=True).items())


def _identity(file: Path) -> tuple[str, int, int]:
    status = file.stat()
    return str(file), status.st_size, status.st_mtime_ns
