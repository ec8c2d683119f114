"""Statistics on disk: for each model a safetensors file, and a list of which tensor each of its parts belongs to."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from toolkit.checkpoints.dtypes import DTYPES, Bytes, Floats, encode
from toolkit.checkpoints.headers import TensorInfo
from toolkit.checkpoints.reader import FolderCheckpoint, read_json
from toolkit.checkpoints.writer import WeightsWriter, write_text


@dataclass(frozen=True)
class Part:
    """Where the statistics of a tensor are.

    Attributes:
        stored: name in the file; tensors that see the same inputs share one.
        shape: of it.
        transposed: whether the tensor has its inputs as rows, as GPT-2's have, and not as columns.
    """

    stored: str
    shape: tuple[int, ...]
    transposed: bool = False


@dataclass(frozen=True)
class Statistics:
    """What data says about one tensor, for every model of a merge.

    Attributes:
        files: of the models, in order.
        parts: where in each.
    """

    files: Sequence[FolderCheckpoint]
    parts: Sequence[Part]

    @property
    def transposed(self) -> bool:
        """Whether the tensor has its inputs as rows."""
        return self.parts[0].transposed

    def read(self, start: int, stop: int) -> Floats:
        """Return elements `start` to `stop` of every model's, flattened, `[M, N]`."""
        out = np.empty((len(self.files), stop - start), np.float32)
        for row, file, part in zip(out, self.files, self.parts, strict=True):
            file.read(part.stored, start, stop, row)
        return out

    def whole(self) -> Floats:
        """Return every model's, `[M, *shape]`."""
        shape = self.parts[0].shape
        return self.read(0, int(np.prod(shape))).reshape(len(self.files), *shape)


class StatisticsWriter:
    """Writes one model's statistics; what is not closed in good order is no statistics.

    Args:
        folder: to write in.
        index: of the model among those of the merge.
        parts: by tensor.
    """

    def __init__(self, folder: Path, index: int, parts: Mapping[str, Part]) -> None:
        self.folder, self.index, self.parts = folder, index, parts
        stored = {part.stored: part.shape for part in parts.values()}
        layout = [TensorInfo(name, DTYPES["F32"], shape) for name, shape in stored.items()]
        self._writer = WeightsWriter(folder, {weights_file(index): layout})

    def write(self, stored: str, values: Floats) -> None:
        """Write a part, float32."""
        raw: Bytes = encode(np.ascontiguousarray(values, np.float32).reshape(-1), DTYPES["F32"])
        self._writer.write(stored, 0, raw)

    def finish(self) -> None:
        """Close the file, and say that it is whole."""
        self._writer.flush()
        self._writer.close()
        parts = {name: vars(part) for name, part in self.parts.items()}
        write_text(self.folder / _list(self.index), json.dumps(parts) + "\n")


def weights_file(index: int) -> str:
    """Return the name of the file that holds a model's statistics."""
    return f"statistics-{index}.safetensors"


def _list(index: int) -> str:
    return f"statistics-{index}.json"


def is_measured(folder: Path, index: int) -> bool:
    """Tell whether a model's statistics are there, whole."""
    return (folder / _list(index)).is_file()


def open_statistics(folder: Path, models: int) -> dict[str, Statistics]:
    """Open the statistics of all models; return those of each tensor that all of them have."""
    files = [FolderCheckpoint(folder / weights_file(i)) for i in range(models)]
    lists = [read_json(folder / _list(i)) for i in range(models)]
    found = {}
    for name in lists[0]:
        if all(name in of_model for of_model in lists):
            parts = [Part(p["stored"], tuple(p["shape"]), p["transposed"]) for p in (m[name] for m in lists)]
            found[name] = Statistics(files, parts)
    return found


def remove_statistics(folder: Path) -> None:
    """Delete the statistics of all models."""
    for file in folder.glob("statistics-*"):
        file.unlink()
