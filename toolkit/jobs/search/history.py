"""The journal of a search: a line of JSON for everything that was measured, in order."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from toolkit.checkpoints.writer import clear
from toolkit.errors import OutputError

HISTORY = "history.jsonl"


class History:
    """What a search has measured. A search proposes the same candidates again, so a line is known by its turn.

    Args:
        folder: that the journal is in; emptied where there is nothing to go on with.
        fingerprint: of the search; the journal of another one is refused.
        resume: go on with the journal that is there.

    Raises:
        OutputError: it belongs to another search.
    """

    def __init__(self, folder: Path, fingerprint: str, *, resume: bool) -> None:
        self.path = folder / HISTORY
        self._recorded = _read(self.path) if resume else []
        self._next = 1
        if self._recorded and self._recorded[0] != {"search": fingerprint}:
            raise OutputError(
                f"{folder}: holds a search of another spec, or of models or data that changed since; run without"
                " --resume to start anew"
            )
        if not self._recorded:
            clear(folder)
        self._file = os.open(self.path, os.O_CREAT | os.O_APPEND | os.O_WRONLY, 0o644)
        if not self._recorded:
            self._append({"search": fingerprint})

    @property
    def is_empty(self) -> bool:
        """Whether nothing was measured."""
        return len(self._recorded) <= 1

    def step(self, what: Mapping[str, Any], measure: Callable[[], Mapping[str, Any]]) -> Mapping[str, Any]:
        """Return what was found of `what` in an earlier run; else measure it and note it.

        Raises:
            OutputError: the earlier run measured something else in this turn.
        """
        if self._next == len(self._recorded):
            self._append({**what, **measure()})
        found = self._recorded[self._next]
        if any(found.get(key) != value for key, value in what.items()):
            raise OutputError(
                f"{self.path}: line {self._next + 1} is not of what this search measures now, perhaps for another"
                " version of a library; run without --resume to start anew"
            )
        self._next += 1
        return found

    def close(self) -> None:
        """Close the file."""
        os.close(self._file)

    def _append(self, entry: dict[str, Any]) -> None:
        try:
            os.write(self._file, (json.dumps(entry) + "\n").encode())
            os.fsync(self._file)
        except OSError as error:
            raise OutputError(f"{self.path}: {error.strerror}") from None
        self._recorded.append(entry)


def _read(path: Path) -> list[dict[str, Any]]:
    """Return the whole lines of a journal; what follows the last newline was cut off by a kill, and is dropped."""
    if not path.is_file():
        return []
    text = path.read_bytes()
    whole = text.rfind(b"\n") + 1
    os.truncate(path, whole)
    return [json.loads(line) for line in text[:whole].splitlines()]
