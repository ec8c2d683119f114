"""The folder of a run under way: its identity, and the checkpoint to go on from."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

from toolkit.adapters.spec import TrainSpec
from toolkit.checkpoints.writer import clear, write_text
from toolkit.errors import OutputError

CHECKPOINTS = "checkpoints"
IDENTITY = "run.json"


def begin(partial: Path, spec: TrainSpec) -> None:
    """Empty the folder and note which run it holds."""
    clear(partial)
    write_text(partial / IDENTITY, json.dumps({"fingerprint": fingerprint(spec)}) + "\n")


def finish(partial: Path) -> None:
    """Drop the note; the run is complete."""
    (partial / IDENTITY).unlink()


def last_checkpoint(partial: Path, spec: TrainSpec) -> Path | None:
    """Return the newest checkpoint that was written to its end, or `None` where no step was saved.

    Raises:
        OutputError: no run there, or one of another spec or of other data.
    """
    if not (partial / IDENTITY).is_file():
        raise OutputError(f"{partial}: no run to resume here; run without --resume to start one")
    if json.loads((partial / IDENTITY).read_text(encoding="utf-8"))["fingerprint"] != fingerprint(spec):
        raise OutputError(
            f"{partial}: the spec or its data changed since this run began; run without --resume to start anew"
        )
    for folder in checkpoints(partial):
        try:  # written last
            json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
        except (FileNotFoundError, json.JSONDecodeError):
            shutil.rmtree(folder)
        else:
            return folder
    return None


def checkpoints(partial: Path) -> list[Path]:
    """Return the checkpoints of a run, newest first."""
    return sorted((partial / CHECKPOINTS).glob("checkpoint-*"), key=step_of, reverse=True)


def step_of(checkpoint: Path) -> int:
    """Return the step after which a checkpoint was written."""
    return int(checkpoint.name.split("-")[1])


def fingerprint(spec: TrainSpec) -> str:
    """Return an identity of a run: its spec and the bytes of its data."""
    digest = hashlib.blake2b(digest_size=16)
    digest.update(spec.model_dump_json(exclude={"out"}).encode())
    for file in (*spec.data.train, *(spec.data.validation or ())):
        path = Path(file).expanduser()
        digest.update(path.read_bytes() if path.is_file() else b"")
    return digest.hexdigest()
