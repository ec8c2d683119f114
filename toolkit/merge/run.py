"""Execute a merge: tensor by tensor, chunk by chunk, into preallocated files, resumable at any moment."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from toolkit import specs
from toolkit.checkpoints.companions import copy_companions, write_card, write_config
from toolkit.checkpoints.deltas import CHUNK, chunks
from toolkit.checkpoints.dtypes import Floats, encode
from toolkit.checkpoints.headers import TensorInfo
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
from toolkit.errors import OutputError
from toolkit.merge.inputs import Inputs
from toolkit.merge.method import Method
from toolkit.merge.plan import Job, Plan, make_plan
from toolkit.merge.spec import MergeSpec
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
    """

    path: Path = Path()
    non_finite: Sequence[str] = ()


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
    allow_pickle: bool = False,
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
        workers: threads; by default one per core, at most four.
        shard_bytes: largest size of an output file.
        allow_pickle: also read pickled checkpoints, with `weights_only`.
        quiet: show no progress.

    Raises:
        SpecError: everything that is wrong with the spec and the way its models fit, before any weight is read.
        OutputError: `out` exists, or cannot be written.
    """
    out = Path(out)
    loaded = specs.load(spec, MergeSpec, overrides=overrides, smoke=smoke)
    check_free(out, overwrite=overwrite)
    if loaded.output.type == "adapter":
        from toolkit.merge.lowrank import merge_adapters

        return merge_adapters(loaded, out, overwrite=overwrite, quiet=quiet)
    plan = make_plan(loaded, allow_pickle=allow_pickle, shard_bytes=shard_bytes)
    try:
        return _execute(plan, out, resume=resume, workers=workers or min(4, os.cpu_count() or 1), quiet=quiet)
    finally:
        plan.inputs.close()


def _execute(plan: Plan, out: Path, *, resume: bool, workers: int, quiet: bool) -> MergeResult:
    started = time.perf_counter()
    with locked(staging_path(out)) as partial:
        journal = Journal(partial / JOURNAL, plan.fingerprint())
        done = journal.load() if resume else {}
        if not done:
            clear(partial)
            check_space(out, plan.write_bytes)
            journal.start()
        writer = WeightsWriter(partial, plan.shards, resume=bool(done))
        try:
            with track("merging", plan.read_bytes, unit="B", quiet=quiet) as progress:
                done |= _run_jobs(plan, writer, journal, done, workers, progress)
            writer.flush()
            writer.write_index()
        finally:
            writer.close()
            journal.close()
        _write_companions(plan, partial)
        (partial / JOURNAL).unlink()
        commit(partial, out)
    return _result(plan, out, sorted(n for n, finite in done.items() if not finite), time.perf_counter() - started)


def _run_jobs(
    plan: Plan, writer: WeightsWriter, journal: Journal, done: dict[str, bool], workers: int, progress: Progress
) -> dict[str, bool]:
    """Run what is not done yet; return for every tensor whether its output is finite."""
    finite: dict[str, bool] = {}
    worker = _Worker(plan, writer)
    jobs = [job for job in plan.jobs if job.tensor.name not in done]
    progress.advance(plan.read_bytes - sum(job.read_bytes for job in jobs))
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

    def __init__(self, plan: Plan, writer: WeightsWriter) -> None:
        self.method, self.inputs, self.writer = plan.method, plan.inputs, writer
        self.local = threading.local()

    def run(self, job: Job) -> bool:
        """Merge or copy one tensor; tell whether what was written is finite."""
        return self._copy(job) if job.action == "copy" else self._merge(job)

    def _copy(self, job: Job) -> bool:
        donor, name = self.inputs.donor, job.tensor.name
        same = donor.info(name).dtype == job.tensor.dtype
        finite = True
        for start, stop in chunks(job.tensor.shape):
            if same:
                raw = donor.read_raw(name, start, stop)
            else:
                values = self._scratch().base[: stop - start]
                donor.read(name, start, stop, values)
                finite &= bool(np.isfinite(values).all())
                raw = encode(values, job.tensor.dtype)
            self.writer.write(name, start, raw)
        return finite

    def _merge(self, job: Job) -> bool:
        stream = Stream(job.tensor, self.method, self.inputs, self._scratch())
        state = self.method.prepare(stream, job.params) if self.method.prepare else None
        finite = True
        for start, merged in merged_chunks(stream, self.method, job, state):
            finite &= bool(np.isfinite(merged).all())
            self.writer.write(job.tensor.name, start, encode(merged, job.tensor.dtype))
        return finite

    def _scratch(self) -> Scratch:
        if not hasattr(self.local, "scratch"):
            self.local.scratch = Scratch(len(self.inputs.models))
        return self.local.scratch


class Scratch:
    """Buffers of one thread: a chunk of the base and one of every model."""

    def __init__(self, num_models: int) -> None:
        self.base = np.empty(CHUNK, np.float32)
        self.stack = np.empty(num_models * CHUNK, np.float32)


class Stream:
    """One tensor of every input, as the method takes it; see `TensorStream`."""

    def __init__(self, tensor: TensorInfo, method: Method, inputs: Inputs, scratch: Scratch) -> None:
        self.tensor, self.inputs, self.scratch = tensor, inputs, scratch
        self.deltas = method.takes == "deltas"
        self.count, self.num_models = tensor.count, len(inputs.models)

    def of_model(self, index: int, every: int = 1) -> Iterator[tuple[int, Floats]]:
        """Yield `(start, [N])` for one input, of each `every`-th chunk."""
        for start, stop in islice(chunks(self.tensor.shape), 0, None, every):
            self._read_base(start, stop)
            out = self.scratch.stack[: stop - start]
            self._read(index, start, stop, out)
            yield start, out

    def stacked(self) -> Iterator[tuple[int, Floats]]:
        """Yield `(start, [M, N])` for all inputs; the base's chunk is then in the scratch."""
        for start, stop in chunks(self.tensor.shape):
            self._read_base(start, stop)
            size = stop - start
            x = self.scratch.stack[: self.num_models * size].reshape(self.num_models, size)
            for index in range(self.num_models):
                self._read(index, start, stop, x[index])
            yield start, x

    def _read_base(self, start: int, stop: int) -> None:
        if self.deltas and self.inputs.base:
            self.inputs.base.read(self.tensor.name, start, stop, self.scratch.base[: stop - start])

    def _read(self, index: int, start: int, stop: int, out: Floats) -> None:
        model = self.inputs.models[index]
        if not self.deltas:
            model.weights.read(self.tensor.name, start, stop, out)
        elif model.delta and model.delta.touches(self.tensor.name):
            model.delta.read(self.tensor.name, start, stop, self.scratch.base[: stop - start], out)
        else:
            out.fill(0)


def merged_chunks(stream: Stream, method: Method, job: Job, state: object) -> Iterator[tuple[int, Floats]]:
    """Yield `(start, [N])`, the merged weights of a tensor before they are rounded."""
    for start, x in stream.stacked():
        merged = method.combine(x, job.params, state, start)
        if stream.deltas:
            np.add(merged, stream.scratch.base[: len(merged)], out=merged)
        yield start, merged


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
        """Return the finished tensors, and whether each is finite; empty where nothing was begun.

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
        self._open()
        return done

    def start(self) -> None:
        """Begin an empty journal."""
        self._open()
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

    def _open(self) -> None:
        self._file = os.open(self.path, os.O_CREAT | os.O_APPEND | os.O_WRONLY, 0o644)

    def _append(self, entry: dict[str, object]) -> None:
        assert self._file is not None
        try:
            os.write(self._file, (json.dumps(entry) + "\n").encode())
            os.fsync(self._file)
        except OSError as error:
            raise OutputError(f"{self.path}: {error.strerror}") from None


def _write_companions(plan: Plan, partial: Path) -> None:
    donor = plan.inputs.donor
    changes = {"tie_word_embeddings": False} if plan.unties_head else {}
    write_config(donor, partial, plan.dtype, changes)
    if donor.folder:
        copy_companions(donor.folder, partial)
    spec = plan.spec
    sources = [m.model_dump()["model"] for m in spec.models]
    base = spec.model_dump()["base_model"]
    write_card(
        partial,
        f"{plan.method.name} merge of {len(plan.inputs.models)} models",
        f"Merged from {', '.join(f'`{s}`' for s in sources)}" + (f" on the base `{base}`." if base else "."),
        tags=["merge", plan.method.name],
        base=[base] if base else sources,
        spec=spec.model_dump(mode="json", by_alias=True, exclude_defaults=True),
        details=_inputs_table(plan).to_markdown(),
    )


def _inputs_table(plan: Plan) -> Table:
    rows = []
    for model in plan.inputs.models:
        adapter = model.adapter
        what = adapter.describe() if adapter else f"{len(model.weights.tensors)} tensors"
        size = adapter.nbytes if adapter else model.weights.nbytes
        rows.append([model.weights.source, what, human_bytes(size)])
    return Table(("input", "kind", "size"), rows)


def _result(plan: Plan, out: Path, non_finite: Iterable[str], seconds: float) -> MergeResult:
    bad = list(non_finite)
    numbers = {
        "path": str(out),
        "method": plan.method.name,
        "tensors": len(plan.jobs),
        "read_bytes": plan.read_bytes,
        "write_bytes": plan.write_bytes,
        "seconds": round(seconds, 3),
        "non_finite": bad,
    }
    rows = [
        ["method", plan.method.name],
        ["inputs", len(plan.inputs.models)],
        ["tensors", len(plan.jobs)],
        ["written", human_bytes(plan.write_bytes)],
        ["seconds", f"{seconds:.2f}"],
    ]
    if bad:
        rows.append(["NaN or infinity in", ", ".join(bad[:5]) + (f" and {len(bad) - 5} more" if len(bad) > 5 else "")])
    return MergeResult(numbers, [Table(("merge", str(out)), rows)], out, bad)
