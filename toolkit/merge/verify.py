"""Check a merge from its record: a sample of it is computed again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from toolkit.checkpoints.deltas import chunks
from toolkit.checkpoints.dtypes import encode
from toolkit.checkpoints.reader import FolderCheckpoint, read_json
from toolkit.errors import CheckpointError, MissingError, UnsupportedError
from toolkit.merge.job import Job, Place
from toolkit.merge.plan import Plan, make_plan
from toolkit.merge.record import RECORD, file_identity, sampled_hash
from toolkit.merge.stream import Stream, scratch_of, survey
from toolkit.progress import track
from toolkit.tables import Cell, Report, Table

_TENSORS = {"element": 256, "row": 256, "tensor": 8}
"""Tensors that are computed again, by the scope of the method."""


@dataclass(frozen=True)
class Verification(Report):
    """A merge that was computed again in part; `numbers["equal"]` tells whether all of it was the same."""


def verify(folder: str | Path, *, allow_pickle: bool = False, quiet: bool = False) -> Verification:
    """Compute a sample of a merge again from its record, and compare it with what was written, byte by byte.

    Every tensor of the output is looked at by name, shape and dtype; of up to 256 of them, spread over the model, one
    slice each is computed again (of 8, for methods that need whole tensors), on the device that merged them. A LoRA,
    or a small change of the base, is made again whole.

    Args:
        folder: that `merge` wrote.
        allow_pickle: also read pickled checkpoints, with `weights_only`.
        quiet: show no progress.

    Raises:
        MissingError: the folder, its record or an input is not there.
        CheckpointError: an input is another file than it was.
    """
    folder = Path(folder).expanduser()
    if not (folder / RECORD).is_file():
        raise MissingError(f"{folder}: no {RECORD}; only what `toolkit merge` wrote can be verified")
    record = read_json(folder / RECORD)
    if record["in_memory"]:
        raise UnsupportedError(f"{folder}: models in memory were merged, which cannot be read again")
    for entry in record["inputs"]:
        _check_unchanged(entry)
    if "output" in record["spec"]:
        return _made_again(folder, record["spec"], allow_pickle=allow_pickle, quiet=quiet)
    plan = make_plan(record["spec"], allow_pickle=allow_pickle, device=record.get("device", "cpu"))
    if plan.method.statistics:
        plan.inputs.close()
        raise UnsupportedError(f"{folder}: {plan.method.name} measures models on data; merge again to compare")
    try:
        with FolderCheckpoint(folder) as written:
            faults = list(_misplaced(plan, written))
            chosen = [] if faults else _chosen(plan)
            faults += _different(plan, written, chosen, quiet)
    finally:
        plan.inputs.close()
    return _verification(folder, len(plan.jobs), len(chosen), faults)


def _verification(folder: Path, tensors: int, computed: int, faults: Sequence[str]) -> Verification:
    numbers = {"path": str(folder), "equal": not faults, "tensors": tensors, "computed": computed}
    rows: list[Sequence[Cell]] = [["tensors", tensors], ["computed again", computed]]
    rows += [["different", fault] for fault in faults] or [["result", "the same bytes"]]
    return Verification(numbers | {"faults": list(faults)}, [Table(("verify", str(folder)), rows)])


def _made_again(folder: Path, spec: Mapping[str, Any], *, allow_pickle: bool, quiet: bool) -> Verification:
    """Make a merge again that is not a full checkpoint, and compare all of its tensors."""
    from toolkit.merge.run import merge

    with TemporaryDirectory() as place, ExitStack() as stack:
        again = merge(spec, Path(place) / "again", card=False, allow_pickle=allow_pickle, quiet=quiet).path
        wanted, written = (_all_tensors(where, stack) for where in (again, folder))
        faults = [f"{name} is not there" for name in wanted if name not in written]
        faults += [f"{name} is of no input" for name in written if name not in wanted]
        both = [name for name in wanted if name in written]
        faults += [name for name in both if not _equal(wanted[name], written[name])]
    return _verification(folder, len(wanted), len(both), faults)


def _all_tensors(folder: Path, stack: ExitStack) -> dict[str, Place]:
    files = [stack.enter_context(FolderCheckpoint(file)) for file in sorted(folder.glob("*.safetensors"))]
    return {name: Place(checkpoint, name) for checkpoint in files for name in checkpoint.tensors}


def _equal(a: Place, b: Place) -> bool:
    same = (a.info.shape, a.info.dtype) == (b.info.shape, b.info.dtype)
    return same and np.array_equal(a.read_raw(0, a.info.count), b.read_raw(0, b.info.count))


def _check_unchanged(entry: Mapping[str, Any]) -> None:
    file = Path(entry["file"])
    if not file.is_file():
        raise MissingError(f"{file}: was merged and is not there now")
    same = file.stat().st_size == entry["bytes"]
    if same and "sampled_sha256" in entry:
        same = sampled_hash(file) == entry["sampled_sha256"]
    elif same:
        same = file_identity(file, "full")["sha256"] == entry["sha256"]
    if not same:
        raise CheckpointError(f"{file}: is not the file that was merged")


def _misplaced(plan: Plan, written: FolderCheckpoint) -> Iterator[str]:
    wanted = {job.tensor.name: job.tensor for job in plan.jobs}
    yield from (f"{name} is not there" for name in wanted if name not in written.tensors)
    yield from (f"{name} is of no input" for name in written.tensors if name not in wanted)
    for name, info in written.tensors.items():
        if name in wanted and (info.shape, info.dtype) != (wanted[name].shape, wanted[name].dtype):
            yield f"{name} is {info.dtype.name} {list(info.shape)}"


def _chosen(plan: Plan) -> list[Job]:
    """Return jobs at even distances; those that a method of whole tensors can afford."""
    jobs = [job for job in plan.jobs if job.tensor.count]
    count = min(len(jobs), _TENSORS[plan.method.scope])
    return [jobs[i] for i in sorted({int(i) for i in np.linspace(0, len(jobs) - 1, count)})] if jobs else []


def _different(plan: Plan, written: FolderCheckpoint, chosen: Sequence[Job], quiet: bool) -> list[str]:
    """Compute one slice of each job again; name what differs."""
    surveyed = survey(plan) if chosen else {}
    scratch, rng, faults = scratch_of(plan), np.random.default_rng(0), []
    with track("verifying", len(chosen), unit="tensors", quiet=quiet) as progress:
        for job in chosen:
            stream = scratch.open(job, plan.method, surveyed.get(job.tensor.name))
            slices = list(stream.ranges() if job.action == "merge" else chunks(job.tensor.shape))
            start, stop = slices[int(rng.integers(len(slices)))]
            expected = encode_slice(job, stream, start, stop)
            if not np.array_equal(expected, written.read_raw(job.tensor.name, start, stop)):
                faults.append(f"{job.tensor.name}, elements {start} to {stop}")
            progress.advance()
    return faults


def encode_slice(job: Job, stream: Stream, start: int, stop: int) -> np.ndarray:
    """Return the bytes of a slice of an output tensor, merged or copied."""
    if job.action == "merge":
        return stream.encoded_slice(start, stop)
    if job.donor.info.dtype == job.tensor.dtype and job.donor.is_stored:
        return job.donor.read_raw(start, stop)
    values = stream.scratch.base(stop - start)
    job.donor.read(start, stop, values)
    return encode(values, job.tensor.dtype)
