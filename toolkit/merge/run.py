"""Execute a merge: tensor by tensor, chunk by chunk, into preallocated files, resumable at any moment."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from toolkit import specs
from toolkit.checkpoints.deltas import chunks
from toolkit.checkpoints.dtypes import all_finite, encode
from toolkit.checkpoints.writer import (
    SHARD_BYTES,
    WeightsWriter,
    check_free,
    check_space,
    clear,
    commit,
    locked,
    staging_path,
)
from toolkit.errors import OutputError, Problem
from toolkit.merge.device import find_device
from toolkit.merge.finite import non_finite_inputs, non_finite_outputs
from toolkit.merge.inputs import unnamed_base
from toolkit.merge.job import Job
from toolkit.merge.parts import Part
from toolkit.merge.plan import Plan, make_plan
from toolkit.merge.record import Companions, Hashes
from toolkit.merge.spec import MergeSpec, OutputSpec
from toolkit.merge.statistics.collect import collect
from toolkit.merge.statistics.files import Statistics, remove_statistics
from toolkit.merge.stream import Scratch, scratch_of, survey
from toolkit.progress import Progress, track
from toolkit.tables import Report, Table, human_bytes

JOURNAL = "journal.jsonl"
FLUSH_EVERY = 2.0
"""Seconds between two entries of the journal; a killed merge repeats at most this much work."""


@dataclass(frozen=True)
class MergeResult(Report):
    """A finished merge.

    Attributes:
        path: folder that was written.
        non_finite: output tensors that hold NaN or infinity.
        non_finite_inputs: input -> those of its tensors that hold some, whether or not it reached the output.
    """

    path: Path = Path()
    non_finite: Sequence[str] = ()
    non_finite_inputs: Mapping[str, Sequence[str]] = field(default_factory=dict)


def merge(
    spec: specs.Source | MergeSpec,
    out: str | Path,
    *,
    overrides: Sequence[str] = (),
    smoke: bool = False,
    resume: bool = False,
    overwrite: bool = False,
    workers: int | None = None,
    shard_bytes: int = SHARD_BYTES,
    hashes: Hashes = "sample",
    card: bool = True,
    tokenizer: bool = True,
    allow_pickle: bool = False,
    device: str = "cpu",
    shard: str | None = None,
    quiet: bool = False,
) -> MergeResult:
    """Merge models as a spec says and write the result.

    Memory does not grow with the models, and the bytes written depend on the spec and the inputs alone.

    Args:
        spec: a YAML file, a dict or a `MergeSpec`.
        out: folder to write; it appears only when it is whole.
        overrides: `key.path=value` changes to the spec.
        smoke: apply the spec's own `smoke:` block.
        resume: go on with a merge into `out` that was killed.
        overwrite: replace `out` if it exists.
        workers: threads; by default one, and two where a GPU computes. Measured on two cores, two threads took the
            time of one, for they wait for each other between short calls of numpy.
        shard_bytes: largest size of an output file.
        hashes: identify the inputs' files in the record by a hash of a `sample` of their blocks, or by their `full`
            SHA-256, which takes as long as a merge does; files from the hub have theirs by name.
        card: write a model card.
        tokenizer: copy the tokenizer's files.
        allow_pickle: also read pickled checkpoints, with `weights_only`.
        device: that computes: `cpu`; `cuda` or `cuda:N`, a GPU; or `auto`, a GPU where there is one.
        shard: `i/n` writes the i-th of n shares of the output's files, to `OUT.part-i-of-n`; see `parts.join`.
        quiet: show no progress.

    Raises:
        SpecError: everything that is wrong with the spec and the way its models fit, before any weight is read.
        OutputError: `out` exists, or cannot be written.
        UnsupportedError: there is no such device.
    """
    part = Part.parse(shard) if shard else None
    out = part.folder(Path(out)) if part else Path(out)
    loaded = specs.load(spec, MergeSpec, overrides=overrides, smoke=smoke)
    check_free(out, overwrite=overwrite)
    if part and loaded.output.type != "checkpoint":
        raise loaded.error([Problem("output.type", f"{loaded.output.type} is small; leave out --shard")])
    if loaded.output.type != "checkpoint" and find_device(device):
        raise loaded.error([Problem("output.type", f"{loaded.output.type} is computed on the CPU; leave out --device")])
    beside = Companions(hashes, card, tokenizer)
    if loaded.output.type == "adapter":
        from toolkit.merge.lowrank import merge_adapters

        return merge_adapters(loaded, out, beside, overwrite=overwrite, allow_pickle=allow_pickle, quiet=quiet)
    if loaded.output.type == "compressed":
        return _compress(loaded, out, beside, overwrite=overwrite, allow_pickle=allow_pickle, quiet=quiet)
    plan = make_plan(loaded, allow_pickle=allow_pickle, shard_bytes=shard_bytes, device=device)
    try:
        workers = workers or (2 if plan.device else 1)
        return _execute(plan, out, beside, part, resume=resume, workers=workers, quiet=quiet)
    finally:
        plan.inputs.close()


def _compress(
    spec: MergeSpec, out: Path, beside: Companions, *, overwrite: bool, allow_pickle: bool, quiet: bool
) -> MergeResult:
    """Write a merge as a small change of its base, of which no full checkpoint is made."""
    from toolkit.merge.extract import run_extract

    if spec.base_model is None:
        raise spec.error([Problem("base_model", "required: the output is a change of it")])
    if found := unnamed_base(spec):
        raise spec.error(found)
    options = spec.output.model_dump(by_alias=True, exclude_unset=True, exclude={"type"})
    full = spec.model_copy(update={"output": OutputSpec()})
    full.__pydantic_fields_set__.discard("output")
    job = {"base": spec.base_model, "tuned": {"merged": full}, "as": spec.output.kind, "allow_pickle": allow_pickle}

    def record(plan: Plan, folder: Path) -> Table:
        return beside.write_record(plan, spec, folder)

    result = run_extract(job | options, out, overwrite=overwrite, card=beside.card, record=record, quiet=quiet)
    return MergeResult(result.numbers, result.tables, out)


def _execute(
    plan: Plan, out: Path, beside: Companions, part: Part | None, *, resume: bool, workers: int, quiet: bool
) -> MergeResult:
    started = time.perf_counter()
    shards = part.shards(plan) if part else plan.shards
    with locked(staging_path(out)) as partial:
        journal = Journal(partial / JOURNAL, plan.fingerprint() + (f" {part}" if part else ""))
        done = journal.load() if resume else {}
        begun = resume and journal.path.is_file()
        if not begun:
            clear(partial)
        if not done:
            check_space(out, sum(tensor.nbytes for tensors in shards.values() for tensor in tensors))
        journal.start(anew=not begun)
        statistics = collect(plan, partial, quiet=quiet)
        writer = WeightsWriter(partial, shards, resume=bool(done))
        try:
            done |= _run_jobs(_Worker(plan, writer, statistics), journal, done, workers, quiet)
            writer.flush()
            if part is None:
                writer.write_index()
        finally:
            writer.close()
            journal.close()
        if part is not None:
            part.note(plan, partial, done)
            outputs, inputs = [], {}  # the join tells
        else:
            outputs, inputs = finish(plan, partial, beside, done)
        remove_statistics(partial)
        (partial / JOURNAL).unlink()
        commit(partial, out)
    return result_of(plan, out, outputs, inputs, time.perf_counter() - started, part)


def finish(
    plan: Plan, folder: Path, beside: Companions, finite: Mapping[str, bool]
) -> tuple[Sequence[str], Mapping[str, Sequence[str]]]:
    """Write what stands beside whole weights; return the output's and the inputs' tensors that hold NaN or infinity."""
    bad = sorted(name for name, is_finite in finite.items() if not is_finite)
    outputs, inputs = non_finite_outputs(folder, bad), non_finite_inputs(plan, bad)
    beside.write(plan, folder, outputs, inputs)
    return outputs, inputs


def _run_jobs(
    worker: _Worker, journal: Journal, done: Mapping[str, bool], workers: int, quiet: bool
) -> dict[str, bool]:
    """Run what is not done yet; return for every tensor whether all that was met is finite."""
    wanted = [job for job in worker.plan.jobs if job.tensor.name in worker.writer.placed]
    with track("merging", sum(job.read_bytes for job in wanted), unit="B", quiet=quiet) as progress:
        jobs = [job for job in wanted if job.tensor.name not in done]
        progress.advance(sum(job.read_bytes for job in wanted) - sum(job.read_bytes for job in jobs))
        return _run_all(worker, jobs, journal, workers, progress)


def _run_all(
    worker: _Worker, jobs: Sequence[Job], journal: Journal, workers: int, progress: Progress
) -> dict[str, bool]:
    writer, finite = worker.writer, dict[str, bool]()
    with ThreadPoolExecutor(workers) as pool:
        futures = {pool.submit(worker.run, job): job for job in jobs}
        try:
            for future in as_completed(futures):
                job = futures[future]
                finite[job.tensor.name] = future.result()
                journal.add(job.tensor.name, finite[job.tensor.name], writer)
                progress.advance(job.read_bytes)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return finite


class _Worker:
    """Runs jobs; each thread has scratch of its own."""

    def __init__(self, plan: Plan, writer: WeightsWriter, statistics: Mapping[str, Statistics]) -> None:
        self.plan, self.method, self.writer, self.statistics = plan, plan.method, writer, statistics
        self.surveyed = survey(plan, statistics)
        self.local = threading.local()

    @np.errstate(invalid="ignore", over="ignore")  # what comes of it is found and named
    def run(self, job: Job) -> bool:
        """Merge or copy one tensor; tell whether what was written, and what it was made from, is finite."""
        return self._copy(job) if job.action == "copy" else self._merge(job)

    def _copy(self, job: Job) -> bool:
        same = job.donor.info.dtype == job.tensor.dtype and job.donor.is_stored
        finite = True
        for start, stop in chunks(job.tensor.shape):
            if same:
                raw = job.donor.read_raw(start, stop)
            else:
                values = self._scratch().base(stop - start)
                job.donor.read(start, stop, values)
                raw = encode(values, job.tensor.dtype)
            finite = finite and all_finite(raw, job.tensor.dtype)
            self.writer.write(job.tensor.name, start, raw)
        return finite

    def _merge(self, job: Job) -> bool:
        finite = True
        name = job.tensor.name
        stream = self._scratch().open(job, self.method, self.surveyed.get(name), self.statistics.get(name))
        for start, raw, this_one in stream.encoded():
            finite = finite and this_one
            self.writer.write(name, start, raw)
        return finite and stream.inputs_finite

    def _scratch(self) -> Scratch:
        if not hasattr(self.local, "scratch"):
            self.local.scratch = scratch_of(self.plan)
        return self.local.scratch


class Journal:
    """Which tensors of a merge are on disk: a line of JSON per batch, after the data was flushed.

    Args:
        path: of the file.
        fingerprint: of the plan; a journal of another plan is refused.
    """

    def __init__(self, path: Path, fingerprint: str) -> None:
        self.path, self.fingerprint = path, fingerprint
        self._pending: dict[str, bool] = {}
        self._flushed = time.monotonic()
        self._file: int | None = None

    def load(self) -> dict[str, bool]:
        """Return the finished tensors, and whether all that was met in each is finite; empty where nothing was begun.

        Raises:
            OutputError: the journal belongs to another spec or other inputs.
        """
        if not self.path.is_file():
            return {}
        done: dict[str, bool] = {}
        text = self.path.read_bytes()
        whole = text.rfind(b"\n") + 1
        os.truncate(self.path, whole)  # what follows the last newline was cut off by the kill
        for line in text[:whole].splitlines():
            entry = json.loads(line)
            if "plan" in entry and entry["plan"] != self.fingerprint:
                raise OutputError(
                    f"{self.path.parent}: holds a merge of another spec or of inputs that changed since;"
                    " run without --resume to start anew"
                )
            done |= entry.get("done", {})
        return done

    def start(self, *, anew: bool) -> None:
        """Open the journal to add to it; `anew` begins an empty one."""
        self._file = os.open(self.path, os.O_CREAT | os.O_APPEND | os.O_WRONLY, 0o644)
        if anew:
            self._append({"plan": self.fingerprint})

    def add(self, name: str, finite: bool, writer: WeightsWriter) -> None:
        """Note a finished tensor."""
        self._pending[name] = finite
        if time.monotonic() - self._flushed >= FLUSH_EVERY:
            writer.flush()
            self._append({"done": self._pending})
            self._pending, self._flushed = {}, time.monotonic()

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _append(self, entry: dict[str, object]) -> None:
        assert self._file is not None
        try:
            os.write(self._file, (json.dumps(entry) + "\n").encode())
            os.fsync(self._file)
        except OSError as error:
            raise OutputError(f"{self.path}: {error.strerror}") from None


def result_of(
    plan: Plan,
    out: Path,
    non_finite: Sequence[str],
    inputs: Mapping[str, Sequence[str]],
    seconds: float,
    part: Part | None = None,
) -> MergeResult:
    """Return what is told of a finished merge, or of a part of one."""
    tensors = [t for shard in (part.shards(plan) if part else plan.shards).values() for t in shard]
    numbers = {
        "path": str(out),
        "method": plan.method.name,
        "donors": plan.donors,
        "tensors": len(tensors),
        "read_bytes": plan.read_bytes,
        "write_bytes": sum(tensor.nbytes for tensor in tensors),
        "seconds": round(seconds, 3),
        "non_finite": list(non_finite),
        "non_finite_inputs": dict(inputs),
    }
    rows = [
        ["method", plan.method.name],
        ["inputs", len(plan.inputs.models)],
        ["taken over", plan.donors_text],
        ["tensors", len(tensors)],
        ["written", human_bytes(numbers["write_bytes"])],
        ["seconds", f"{seconds:.2f}"],
    ]
    if non_finite:
        rows.append(["NaN or infinity in the output", _some(non_finite)])
    rows += [["NaN or infinity in an input", f"{source}: {_some(names)}"] for source, names in inputs.items()]
    return MergeResult(numbers, [Table(("merge", str(out)), rows)], out, non_finite, inputs)


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
