"""One job of fine-tuning: what was asked for, and how far it is."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from toolkit.checkpoints.reader import read_json
from toolkit.checkpoints.writer import write_text

Status = Literal["queued", "running", "succeeded", "failed", "cancelled"]
ENDED = ("succeeded", "failed", "cancelled")


@dataclass
class Job:
    """A job, as it is kept on disk.

    Attributes:
        id: that requests name.
        created_at: seconds since 1970.
        name: under which its adapter will be served.
        training_file: id.
        validation_file: id, if any.
        seed: of the run.
        hyperparameters: number of epochs, rows of a batch, and what the learning rate is multiplied by.
        metadata: the client's own.
        status: how far it is.
        started_at: when it last began.
        finished_at: when it ended.
        trained_tokens: for which gradients were computed.
        error: why it failed.
    """

    id: str
    created_at: int
    name: str
    training_file: str
    validation_file: str | None
    seed: int
    hyperparameters: dict[str, float]
    metadata: dict[str, str] = field(default_factory=dict)
    status: Status = "queued"
    started_at: int | None = None
    finished_at: int | None = None
    trained_tokens: int | None = None
    error: str | None = None

    @property
    def has_ended(self) -> bool:
        """Whether nothing more will come of it."""
        return self.status in ENDED

    def save(self, folder: Path) -> None:
        """Write it down."""
        write_text(folder / f"{self.id}.json", json.dumps(asdict(self), indent=1))


def read_jobs(folder: Path) -> dict[str, Job]:
    """Return the jobs in a folder by id, the oldest first."""
    jobs = [Job(**read_json(path)) for path in folder.glob("ftjob-*.json")]
    return {job.id: job for job in sorted(jobs, key=lambda job: (job.created_at, job.id))}


def read_metrics(path: Path) -> list[Mapping[str, Any]]:
    """Return the entries of a run's metrics so far; the last line may be half written."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
