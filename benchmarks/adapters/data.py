"""The rows of every task: three JSONL files of chats, and one of the rows that need the most memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.adapters.spec import CompareSpec
from toolkit.data.rows import read_rows, write_rows
from toolkit.embedded.skills import SKILLS, chat, rows
from toolkit.errors import DataError, MissingError

SPLITS = ("train", "validation", "test")
LONGEST = "longest.jsonl"
"""The longest rows of all tasks, one batch of them."""

Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Task:
    """A column of the table: where its rows are.

    Attributes:
        name: of the skill, or of the task's folder.
        folder: that holds `train.jsonl`, `validation.jsonl` and `test.jsonl`.
    """

    name: str
    folder: Path

    def file(self, split: str) -> Path:
        """Return the file of a split."""
        return self.folder / f"{split}.jsonl"


def write_tasks(spec: CompareSpec, data: Path | None, out: Path, batch: int) -> list[Task]:
    """Write the rows of every task; those with too long a text for the base are left out.

    Args:
        spec: of the comparison.
        data: folder of the real tasks.
        out: folder to write.
        batch: rows of `LONGEST`.

    Raises:
        MissingError: no such folder of a real task.
        DataError: a row without text and label.
    """
    if spec.tasks and data is None:
        raise MissingError(f"--data: required, the folder of {', '.join(spec.tasks)}")
    found = {name: _skill(spec, name) for name in spec.skills}
    found |= {name: _real(spec, name, Path(data or "") / name) for name in spec.tasks}
    tasks = [Task(name, out / name) for name in found]
    for task in tasks:
        task.folder.mkdir(parents=True, exist_ok=True)
        for split in SPLITS:
            write_rows(task.file(split), found[task.name][split])
    trained = [row for splits in found.values() for row in splits["train"]]
    write_rows(out / LONGEST, sorted(trained, key=_length)[-batch:])
    return tasks


def _skill(spec: CompareSpec, name: str) -> dict[str, Rows]:
    """Return generated rows; tests are other payloads, asked for in other words."""
    made = rows(SKILLS[name], split="train", count=spec.train + spec.validation, seed=0)
    tested = rows(SKILLS[name], split="test", count=spec.test, seed=0, phrasing="held_out")
    return {"train": made[: spec.train], "validation": made[spec.train :], "test": tested}


def _real(spec: CompareSpec, name: str, folder: Path) -> dict[str, Rows]:
    if not folder.is_dir():
        raise MissingError(f"{folder}: no such folder; expected one with {', '.join(SPLITS)}.jsonl")
    most = {"train": spec.train, "validation": spec.validation, "test": spec.test}
    return {split: _chats(folder / f"{split}.jsonl")[: most[split]] for split in SPLITS}


def _chats(file: Path) -> Rows:
    """Ask for the label of every text."""
    found = []
    for row in read_rows(file):
        text, label = row.data.get("text"), row.data.get("label")
        if not isinstance(text, str) or not isinstance(label, str):
            raise DataError(f"{row.place}: expected text and label, both texts, got {dict(row.data)!r:.80}")
        found.append(chat(text, label))
    return found


def _length(row: Mapping[str, Any]) -> int:
    messages: Sequence[Mapping[str, str]] = row["messages"]
    return sum(len(message["content"]) for message in messages)
