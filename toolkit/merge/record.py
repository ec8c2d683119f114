"""What a merge leaves beside its weights: the model card, and a record from which the merge can be checked."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from toolkit.checkpoints.companions import (
    OTHER_FILES,
    TOKENIZER_FILES,
    copy_companions,
    file_hashes,
    versions,
    write_card,
    write_config,
)
from toolkit.checkpoints.deltas import chunks
from toolkit.checkpoints.dtypes import encode
from toolkit.checkpoints.reader import FolderCheckpoint, MemoryCheckpoint, read_json
from toolkit.checkpoints.tokenizers import write_tokenizer
from toolkit.checkpoints.writer import write_text
from toolkit.errors import CheckpointError, MissingError, UnsupportedError
from toolkit.merge.plan import Job, Plan, make_plan
from toolkit.merge.stream import Stream, scratch_of, survey
from toolkit.progress import track
from toolkit.tables import Cell, Report, Table, human_bytes

RECORD = "merge.json"

Hashes = Literal["sample", "full"]
"""How input files are identified: by a hash of some of their blocks, or of all of their bytes."""

_BLOCK, _BLOCKS = 1 << 14, 64
"""Bytes of a block of a sampled hash, and blocks of a file."""

_HUB_HASH = re.compile(r"[0-9a-f]{64}")
"""Name of a weight file in the hub's cache: its SHA-256."""

_TENSORS = {"element": 256, "row": 256, "tensor": 8}
"""Tensors that a verification computes again, by the scope of the method."""


@dataclass(frozen=True)
class Companions:
    """What is written beside the weights of a merge.

    Attributes:
        hashes: of the inputs' files.
        card: write a model card.
        tokenizer: copy the tokenizer's files.
    """

    hashes: Hashes = "sample"
    card: bool = True
    tokenizer: bool = True

    def write(self, plan: Plan, folder: Path, non_finite: Sequence[str], inputs: Mapping[str, Sequence[str]]) -> None:
        """Write config, tokenizer, record and card of a finished merge."""
        donor = plan.inputs.donor
        write_config(donor, folder, plan.dtype, plan.config)
        if donor.folder:
            copy_companions(donor.folder, folder, (*TOKENIZER_FILES, *OTHER_FILES) if self.tokenizer else OTHER_FILES)
        if self.tokenizer:
            write_tokenizer(folder, plan.tokenizer, plan.template)
        files = [_identity(file, self.hashes) for file in sorted(plan.inputs.files())]
        record = {
            "spec": plan.spec.model_dump(mode="json", by_alias=True, exclude_defaults=True),
            "inputs": files,
            "in_memory": any(isinstance(checkpoint, MemoryCheckpoint) for checkpoint in plan.inputs.checkpoints),
            "device": plan.device or "cpu",
            "tensors": len(plan.jobs),
            "non_finite": list(non_finite),
            "non_finite_inputs": dict(inputs),
            "versions": versions(),
        }
        write_text(folder / RECORD, json.dumps(record, indent=2) + "\n")
        if self.card:
            _write_card(folder, plan, files)


def _write_card(folder: Path, plan: Plan, files: Sequence[Mapping[str, Any]]) -> None:
    sources = list(dict.fromkeys(model.weights.source for model in plan.inputs.models))
    base = plan.inputs.base.source if plan.inputs.base else None
    write_card(
        folder,
        f"{plan.method.name} merge of {len(plan.inputs.models)} models",
        f"Merged from {', '.join(f'`{s}`' for s in sources)}" + (f" on the base `{base}`." if base else "."),
        tags=["merge", plan.method.name],
        base=[base] if base else sources,
        spec=plan.spec.model_dump(mode="json", by_alias=True, exclude_defaults=True),
        details="\n\n".join(table.to_markdown() for table in (_models_table(plan), _files_table(files))),
    )


def _identity(file: Path, hashes: Hashes) -> dict[str, Any]:
    found: dict[str, Any] = {"file": str(file), "bytes": file.stat().st_size}
    blob = file.resolve().name
    if _HUB_HASH.fullmatch(blob):
        return found | {"sha256": blob}
    if hashes == "full":
        return found | {"sha256": file_hashes([file])[file.name]}
    return found | {"sampled_sha256": _sampled(file)}


def _sampled(file: Path) -> str:
    """Hash 64 blocks of 16 KiB that are spread over a file, the first and the last among them."""
    size, digest = file.stat().st_size, hashlib.sha256()
    with file.open("rb") as stream:
        for start in np.linspace(0, max(0, size - _BLOCK), _BLOCKS if size > _BLOCK else 1, dtype=np.int64):
            stream.seek(int(start))
            digest.update(stream.read(_BLOCK))
    return digest.hexdigest()


def _models_table(plan: Plan) -> Table:
    rows: list[Sequence[Cell]] = []
    for model in plan.inputs.models:
        adapter = model.adapter
        what = adapter.describe() if adapter else f"{len(model.weights.tensors)} tensors"
        size = adapter.nbytes if adapter else model.weights.nbytes
        rows.append([model.weights.source, what, human_bytes(size)])
    return Table(("input", "kind", "size"), rows)


def _files_table(files: Sequence[Mapping[str, Any]]) -> Table:
    rows = [
        [f["file"], human_bytes(f["bytes"]), f.get("sha256") or f"{f['sampled_sha256']} (of {_BLOCKS} blocks)"]
        for f in files
    ]
    return Table(("file", "size", "SHA-256"), rows)


@dataclass(frozen=True)
class Verification(Report):
    """A merge that was computed again in part; `numbers["equal"]` tells whether all of it was the same."""


def verify(folder: str | Path, *, allow_pickle: bool = False, quiet: bool = False) -> Verification:
    """Compute a sample of a merge again from its record, and compare it with what was written, byte by byte.

    Every tensor of the output is looked at by name, shape and dtype; of up to 256 of them, spread over the model, one
    slice each is computed again (of 8, for methods that need whole tensors), on the device that merged them.

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
        raise MissingError(f"{folder}: no {RECORD}; only what `toolkit merge` wrote as a checkpoint can be verified")
    record = read_json(folder / RECORD)
    if record["in_memory"]:
        raise UnsupportedError(f"{folder}: models in memory were merged, which cannot be read again")
    for entry in record["inputs"]:
        _check_unchanged(entry)
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
    numbers = {"path": str(folder), "equal": not faults, "tensors": len(plan.jobs), "computed": len(chosen)}
    rows: list[Sequence[Cell]] = [["tensors", len(plan.jobs)], ["computed again", len(chosen)]]
    rows += [["different", fault] for fault in faults] or [["result", "the same bytes"]]
    return Verification(numbers | {"faults": faults}, [Table(("verify", str(folder)), rows)])


def _check_unchanged(entry: Mapping[str, Any]) -> None:
    file = Path(entry["file"])
    if not file.is_file():
        raise MissingError(f"{file}: was merged and is not there now")
    same = file.stat().st_size == entry["bytes"]
    if same and "sampled_sha256" in entry:
        same = _sampled(file) == entry["sampled_sha256"]
    elif same:
        same = _identity(file, "full")["sha256"] == entry["sha256"]
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
