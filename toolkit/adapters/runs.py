"""The folder of a run under way: its identity, and the checkpoint to go on from."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from toolkit.adapters.spec import SourceSpec, TrainSpec
from toolkit.checkpoints.companions import file_hashes
from toolkit.checkpoints.reader import read_json
from toolkit.checkpoints.writer import clear, write_text
from toolkit.data.rows import Row, read_source
from toolkit.errors import CheckpointError, MissingError, OutputError

CHECKPOINTS = "checkpoints"
METRICS = "metrics.jsonl"
IDENTITY = "run.json"
STATE = "trainer_state.json"


def hash_data(spec: TrainSpec) -> dict[str, str]:
    """Return the SHA-256 of every data file of a run, or of the rows of a data set, by its path in the spec.

    A data set that is streamed is not read for this.

    Raises:
        MissingError: no such file or data set.
        DataError: it cannot be read.
    """
    found: dict[str, str] = {}
    for source in (*spec.data.sources(), *spec.data.sources(validation=True)):
        path = Path(os.path.expanduser(source.path))
        if path.is_file():
            (found[source.path],) = file_hashes([path]).values()
        elif spec.data.streaming:
            found[_name(source)] = "streamed"
        else:
            found[_name(source)] = _hash_rows(read_source(source.path, split=source.split, subset=source.subset))
    return found


def _name(source: SourceSpec) -> str:
    return f"{source.path}[{source.subset or 'default'}/{source.split}]"


def _hash_rows(rows: Iterable[Row]) -> str:
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row.data, default=str).encode() + b"\n")
    return digest.hexdigest()


def begin(partial: Path, spec: TrainSpec, data: Mapping[str, str]) -> None:
    """Empty the folder and note which run it holds."""
    clear(partial)
    write_text(partial / IDENTITY, json.dumps({"fingerprint": _fingerprint(spec, data)}) + "\n")


def finish(folder: Path, *, keep_checkpoints: bool) -> None:
    """Drop from a folder in its place what only a run under way needs; the run is complete."""
    (folder / IDENTITY).unlink()
    if not keep_checkpoints:
        shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)


def last_checkpoint(partial: Path, spec: TrainSpec, data: Mapping[str, str]) -> Path | None:
    """Return the newest checkpoint that was written to its end, or `None` where no step was saved.

    Args:
        partial: folder of the run.
        spec: of the run that is to go on.
        data: SHA-256 of its data files.

    Raises:
        OutputError: no run there, or one of another spec or of other data.
    """
    begun = _read(partial / IDENTITY)
    if begun is None:
        raise OutputError(f"{partial}: no run to resume here; run without --resume to start one")
    if begun.get("fingerprint") != _fingerprint(spec, data):
        raise OutputError(
            f"{partial}: the spec or its data changed since this run began; run without --resume to start anew"
        )
    for folder in checkpoints(partial):
        if _read(folder / STATE) is not None:  # written last
            return folder
        shutil.rmtree(folder)
    return None


def is_over(checkpoint: Path) -> bool:
    """Tell whether a checkpoint is the last of its run: every step was taken, or its patience is at an end."""
    state = read_json(checkpoint / STATE)
    stopper = state.get("stateful_callbacks", {}).get("EarlyStoppingCallback")
    if (
        stopper
        and stopper["attributes"]["early_stopping_patience_counter"] >= stopper["args"]["early_stopping_patience"]
    ):
        return True
    return state["global_step"] >= state["max_steps"]


def checkpoints(partial: Path) -> list[Path]:
    """Return the checkpoints of a run, newest first."""
    return sorted((partial / CHECKPOINTS).glob("checkpoint-*"), key=step_of, reverse=True)


def step_of(checkpoint: Path) -> int:
    """Return the step after which a checkpoint was written."""
    return int(checkpoint.name.split("-")[1])


def _read(path: Path) -> dict[str, Any] | None:
    """Read a JSON object; one that is absent or cut off is none."""
    try:
        return read_json(path)
    except (MissingError, CheckpointError):
        return None


def _fingerprint(spec: TrainSpec, data: Mapping[str, str]) -> str:
    """Return an identity of a run: its spec and its data."""
    text = json.dumps([spec.model_dump_json(exclude={"out", "after"}), dict(data)])
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
