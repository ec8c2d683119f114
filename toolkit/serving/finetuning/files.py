"""Files of rows that clients sent: one file and its record for each, in one folder."""

from __future__ import annotations

import json
import os
import secrets
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from toolkit.checkpoints.reader import read_json
from toolkit.checkpoints.writer import write_text
from toolkit.errors import DataError, MissingError

KINDS = (".jsonl", ".csv", ".parquet")
"""Endings of the names of files that can be trained on."""


@dataclass(frozen=True)
class StoredFile:
    """What is known of a file.

    Attributes:
        id: that requests name.
        filename: that the client gave; it names nothing on this disk.
        nbytes: of its content.
        created_at: seconds since 1970.
    """

    id: str
    filename: str
    nbytes: int
    created_at: int


class Files:
    """A folder of files.

    Args:
        folder: made when the first one comes.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def add(self, filename: str, content: bytes) -> StoredFile:
        """Store a file; it is there when its record is.

        Raises:
            DataError: its name does not end like a file of rows, or there is nothing in it.
        """
        ending = Path(filename).suffix.lower()
        if ending not in KINDS:
            raise DataError(f"{filename!r}: send rows in a file whose name ends in {', '.join(KINDS)}")
        if not content.strip():
            raise DataError(f"{filename!r}: the file is empty")
        self.folder.mkdir(parents=True, exist_ok=True)
        stored = StoredFile(f"file-{secrets.token_hex(12)}", filename, len(content), int(time.time()))
        path = self.path(stored)
        with path.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        write_text(self._record(stored.id), json.dumps(asdict(stored)))
        return stored

    def all(self) -> list[StoredFile]:
        """Return all files, the newest first."""
        found = [StoredFile(**read_json(path)) for path in self.folder.glob("file-*.json")]
        return sorted(found, key=lambda file: (-file.created_at, file.id))

    def get(self, file_id: str) -> StoredFile:
        """Return what is known of a file.

        Raises:
            MissingError: no such file.
        """
        # An id is made of these alone, so that none leads out of the folder.
        record = self._record(file_id)
        if not file_id.replace("-", "").isalnum() or not record.is_file():
            raise MissingError(f"no file {file_id!r}")
        return StoredFile(**read_json(record))

    def delete(self, file_id: str) -> None:
        """Forget a file.

        Raises:
            MissingError: no such file.
        """
        stored = self.get(file_id)
        self._record(file_id).unlink()
        self.path(stored).unlink()

    def path(self, stored: StoredFile) -> Path:
        """Return where the content is."""
        return self.folder / f"{stored.id}{Path(stored.filename).suffix.lower()}"

    def _record(self, file_id: str) -> Path:
        return self.folder / f"{file_id}.json"
