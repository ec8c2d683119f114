"""The folder of tasks, `TASK/{train,validation,test}.jsonl` with rows of `{"text", "label"}`; and shifted inputs."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from toolkit.data.rows import read_rows, write_rows
from toolkit.errors import DataError, MissingError

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class TaskData:
    """One task.

    Attributes:
        name: of its folder.
        labels: in alphabetical order, those of the training rows.
        texts: of each split.
        targets: index of each row's label, of each split.
    """

    name: str
    labels: tuple[str, ...]
    texts: dict[str, list[str]]
    targets: dict[str, list[int]]


def read_tasks(folder: Path, *, limit: int | None = None, evaluated: int | None = None) -> dict[str, TaskData]:
    """Read every task of a folder, and check its layout.

    Args:
        folder: that holds one folder per task.
        limit: most training rows of a task, the first ones.
        evaluated: most validation and most test rows of a task.

    Raises:
        MissingError: no such folder, no tasks in it, or a split that is not there.
        DataError: a row without a text or a label, or with a label that no training row has.
    """
    if not folder.is_dir():
        raise MissingError(
            f"{folder}: no such folder; make it with python -m benchmarks.eight_tasks.make_data {folder}"
        )
    names = sorted(path.name for path in folder.iterdir() if path.is_dir())
    if len(names) < 2:
        raise MissingError(f"{folder}: expected a folder for each of several tasks, found {len(names)}")
    return {name: _read_task(folder / name, limit, evaluated) for name in names}


def _read_task(folder: Path, limit: int | None, evaluated: int | None) -> TaskData:
    texts: dict[str, list[str]] = {}
    found: dict[str, list[str]] = {}
    for split in SPLITS:
        most = limit if split == "train" else evaluated
        rows = read_rows(folder / f"{split}.jsonl")[:most]
        for row in rows:
            if not isinstance(row.data.get("text"), str) or not isinstance(row.data.get("label"), str):
                raise DataError(f"{row.place}: expected text and label, both texts, got {dict(row.data)!r:.80}")
        texts[split] = [row.data["text"] for row in rows]
        found[split] = [row.data["label"] for row in rows]
    labels = tuple(sorted(set(found["train"])))
    if len(labels) < 2:
        raise DataError(f"{folder / 'train.jsonl'}: expected at least two labels, got {', '.join(labels)}")
    for split in SPLITS:
        strange = sorted(set(found[split]) - set(labels))
        if strange:
            raise DataError(f"{folder / split}.jsonl: label {strange[0]!r} is none of the training rows'")
    targets = {split: [labels.index(label) for label in found[split]] for split in SPLITS}
    return TaskData(folder.name, labels, texts, targets)


def write_split(task: TaskData, split: str, file: Path, texts: Sequence[str] | None = None) -> Path:
    """Write a split as rows of text and label, with other texts in place of its own at will."""
    given = task.texts[split] if texts is None else texts
    rows = [{"text": text, "label": task.labels[t]} for text, t in zip(given, task.targets[split], strict=True)]
    file.parent.mkdir(parents=True, exist_ok=True)
    write_rows(file, rows)
    return file


def with_typos(text: str, rng: random.Random) -> str:
    """Swap, drop or double a letter in every fifth word or so, never its first."""
    return " ".join(_mistyped(word, rng) if rng.random() < 0.2 else word for word in text.split(" "))


def _mistyped(word: str, rng: random.Random) -> str:
    if len(word) < 3:
        return word
    at = rng.randrange(1, len(word) - 1)
    how = rng.choice(("swap", "drop", "double"))
    if how == "swap":
        return word[:at] + word[at + 1] + word[at] + word[at + 2 :]
    return word[:at] + word[at + 1 :] if how == "drop" else word[: at + 1] + word[at:]


def in_capitals(text: str, rng: random.Random) -> str:
    """Write everything in capitals; an uncased tokenizer does not see it."""
    return text.upper()


def truncated(text: str, rng: random.Random) -> str:
    """Keep the first half of the words, at least one."""
    words = text.split()
    return " ".join(words[: max(1, (len(words) + 1) // 2)])


SHIFTS: dict[str, Callable[[str, random.Random], str]] = {
    "typos": with_typos,
    "capitals": in_capitals,
    "truncation": truncated,
}


def shifted(texts: Sequence[str], shift: str) -> list[str]:
    """Return the texts of a split as a shift leaves them; the same ones every time."""
    return [SHIFTS[shift](text, random.Random(f"{shift} {index}")) for index, text in enumerate(texts)]
