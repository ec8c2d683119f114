"""Compressed deltas: folders that hold several fine-tunes of one base as small changes of it.

`delta_config.json` names the base and the fine-tunes; `delta.safetensors`, or several shards of it, holds the parts.
A part is called `TENSOR:PART:TASK`, or `TENSOR:PART` where all fine-tunes share it. A fine-tune holds a tensor of the
base in one of these forms, and leaves alone what it holds in none:

    whole           its own values, in the tensor's shape
    change          tuned - base, in the tensor's shape
    vector, mask    change = mask * vector; the vector is shared, the mask one bit per element
    signs, scale    change = +scale where the bit is set, -scale elsewhere
    levels, scale   change = scale * level, levels of 8 bits (I8)
    rows, cols      change = rows @ cols, [M, r] and [r, N]

A scale is one float32, or one per row (a row is the last dimension). Bits are packed from the lowest of each byte, and
the last byte is filled with zeros.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from typing_extensions import override

from toolkit.checkpoints.adapters import Adapter, is_adapter, open_adapter
from toolkit.checkpoints.deltas import AdaptedCheckpoint, AdapterDelta, Delta
from toolkit.checkpoints.dtypes import Bytes, Floats
from toolkit.checkpoints.headers import TensorInfo
from toolkit.checkpoints.locate import locate
from toolkit.checkpoints.reader import Checkpoint, FolderCheckpoint, read_json
from toolkit.checkpoints.writer import SHARD_BYTES, WeightsWriter, plan_shards, write_text
from toolkit.errors import CheckpointError, MissingError, UnsupportedError

CONFIG = "delta_config.json"
FORMAT = 1
"""Version of the format; a reader refuses later ones."""

_STEM = "delta"
_TASK = re.compile(r"[\w.-]+")
_FORMS = ({"whole"}, {"change"}, {"vector", "mask"}, {"signs", "scale"}, {"levels", "scale"}, {"rows", "cols"})
_INTEGERS = {"mask": "U8", "signs": "U8", "levels": "I8"}
"""Parts that are not floating-point -> their dtype."""


def pack_bits(bits: NDArray[np.bool_]) -> Bytes:
    """Pack `[N]` into `[ceil(N / 8)]` bytes, the first element in the lowest bit."""
    return np.packbits(bits, bitorder="little")


def unpack_bits(raw: Bytes, start: int, stop: int) -> NDArray[np.uint8]:
    """Return elements `start` to `stop` as zeros and ones, of the bytes from number `start // 8` on."""
    return np.unpackbits(raw, bitorder="little", count=stop - start // 8 * 8)[start % 8 :]


def packed_bytes(count: int) -> int:
    """Return the bytes that `count` packed bits take."""
    return -(-count // 8)


def part_name(tensor: str, part: str, task: str | None = None) -> str:
    """Return the stored name of a part."""
    return f"{tensor}:{part}" if task is None else f"{tensor}:{part}:{task}"


def is_task_name(name: str) -> bool:
    """Tell whether a fine-tune may be called so: letters, digits, `.`, `_` and `-`."""
    return _TASK.fullmatch(name) is not None


class Compressed:
    """A folder of compressed deltas, and which of its fine-tunes is meant.

    Args:
        folder: that holds `delta_config.json`.
        source: what the user called it.
        task: the fine-tune; by default the only one, if there is one only.

    Attributes:
        config: its `delta_config.json`.
        tasks: fine-tunes -> what they were made from.
        store: the stored parts.
    """

    def __init__(self, folder: Path, source: str = "", task: str | None = None) -> None:
        self.folder, self.source = folder, source or str(folder)
        self.config = read_json(folder / CONFIG)
        self._check_config()
        self.tasks: dict[str, str] = self.config["tasks"]
        if task is not None and task not in self.tasks:
            raise MissingError(f"{self.source}: no fine-tune {task!r} (known: {', '.join(self.tasks)})")
        self.task = task or (next(iter(self.tasks)) if len(self.tasks) == 1 else None)
        self.store = FolderCheckpoint(folder, self.source)
        self._parts = self._sort_parts()

    def _check_config(self) -> None:
        version, tasks = self.config.get("format"), self.config.get("tasks")
        if not isinstance(version, int) or version > FORMAT:
            raise UnsupportedError(f"{self.folder / CONFIG}: format {version!r}; this version reads up to {FORMAT}")
        if not isinstance(tasks, dict) or not tasks or not all(is_task_name(name) for name in tasks):
            raise CheckpointError(f"{self.folder / CONFIG}: tasks must name at least one fine-tune")

    def _sort_parts(self) -> dict[str, dict[str, dict[str, str]]]:
        """Return task -> tensor -> part -> stored name; a part of nothing is an error."""
        own: dict[str, dict[str, dict[str, str]]] = {task: {} for task in self.tasks}
        shared: dict[str, str] = {}
        for stored in self.store.tensors:
            name, part, task = [*stored.split(":"), "", ""][:3]
            if task in own:
                own[task].setdefault(name, {})[part] = stored
            elif part == "vector" and not task:
                shared[name] = stored
            else:
                raise CheckpointError(f"{self.source}: {stored}: not a part of any fine-tune")
        for task, tensors in own.items():
            for name, parts in tensors.items():
                if "mask" in parts and name in shared:
                    parts["vector"] = shared[name]
                if parts.keys() not in _FORMS:
                    raise CheckpointError(f"{self.source}: {name} of {task} has the parts {', '.join(sorted(parts))}")
        return own

    @property
    def parts(self) -> Mapping[str, Mapping[str, str]]:
        """Tensors of the base that the fine-tune changes -> part -> stored name.

        Raises:
            CheckpointError: the folder holds several fine-tunes and none was named.
        """
        if self.task is None:
            some = next(iter(self.tasks))
            known = ", ".join(self.tasks)
            raise CheckpointError(f"{self.source}: holds {known}; name one of them, as in {self.source}#{some}")
        return self._parts[self.task]

    @property
    def base_model(self) -> str | None:
        """Base that the folder says its fine-tunes are of."""
        return self.config.get("base_model")

    @property
    def nbytes(self) -> int:
        """Bytes of all stored parts."""
        return self.store.nbytes

    def describe(self) -> str:
        """Say in a few words what the folder holds."""
        forms = Counter(_form_text(parts) for tensors in self._parts.values() for parts in tensors.values())
        held = ", ".join(f"{count} {form}" for form, count in forms.items())
        return f"{self.config.get('kind', 'deltas')} of {', '.join(self.tasks)}; tensors: {held or 'none'}"

    def close(self) -> None:
        """Close the files."""
        self.store.close()


def _form_text(parts: Mapping[str, str]) -> str:
    return next((part for part in ("whole", "change", "mask", "signs", "levels") if part in parts), "low-rank")


def is_compressed(path: Path) -> bool:
    """Tell whether a folder holds compressed deltas."""
    return (path / CONFIG).is_file()


def open_compressed(source: str | Path) -> Compressed:
    """Open a folder of compressed deltas, local or on the hub; `FOLDER#TASK` names one of its fine-tunes.

    Raises:
        MissingError: nothing there, or no such fine-tune.
        CheckpointError: broken files.
    """
    text, task = split_task(str(source))
    folder = locate(text)
    if not is_compressed(folder):
        raise MissingError(f"{text}: no {CONFIG} in this folder")
    return Compressed(folder, text, task)


def split_task(source: str) -> tuple[str, str | None]:
    """Split `FOLDER#TASK`; a folder whose own name holds a `#` is not split."""
    folder, sep, task = source.rpartition("#")
    return (folder, task) if sep and not Path(source).expanduser().exists() else (source, None)


class CompressedDelta(Delta):
    """One fine-tune of a compressed folder, as a change of `base`."""

    def __init__(self, base: Checkpoint, compressed: Compressed) -> None:
        super().__init__(base, compressed.source + (f"#{compressed.task}" if len(compressed.tasks) > 1 else ""))
        self.compressed, self.parts, self.store = compressed, compressed.parts, compressed.store
        for name, parts in self.parts.items():
            self._check(name, parts)
        self._cols = lru_cache(maxsize=4)(self._read_cols)

    def _check(self, name: str, parts: Mapping[str, str]) -> None:
        if not self.base.has(name):
            raise CheckpointError(f"{self.source}: changes {name}, which {self.base.source} does not have")
        shape = self.base.info(name).shape
        found = {part: self.store.info(stored) for part, stored in parts.items()}
        for part, info in found.items():
            if (_INTEGERS[part] != info.dtype.name) if part in _INTEGERS else not info.dtype.floating:
                raise CheckpointError(f"{self.source}: {info.name} is stored as {info.dtype.name}")
        if any(info.shape not in _shapes(part, shape, found) for part, info in found.items()):
            given = ", ".join(f"{part} {list(info.shape)}" for part, info in found.items())
            raise CheckpointError(
                f"{self.source}: {name} is held as {given}, but in {self.base.source} it is {list(shape)}"
            )

    @override
    def touches(self, name: str) -> bool:
        return name in self.parts

    @override
    def read(self, name: str, start: int, stop: int, base: Floats, out: Floats) -> None:
        parts = self.parts.get(name, {})
        whole = parts.get("whole") or parts.get("change") or parts.get("vector")
        if whole:
            self.store.read(whole, start, stop, out)
        if "whole" in parts:
            np.subtract(out, base, out=out)
        elif "mask" in parts:
            np.multiply(out, self._bits(parts["mask"], start, stop), out=out)
        elif "signs" in parts:
            np.multiply(self._bits(parts["signs"], start, stop), np.float32(2), out=out)
            np.subtract(out, 1, out=out)
        elif "levels" in parts:
            np.copyto(out, self.store.read_raw(parts["levels"], start, stop).view(np.int8))
        elif "rows" in parts:
            np.copyto(out, self._product(parts, start, stop))
        elif not whole:
            out.fill(0)
        if "scale" in parts:
            np.multiply(out, self._scales(name, parts["scale"], start, stop), out=out)

    def _bits(self, stored: str, start: int, stop: int) -> NDArray[np.uint8]:
        return unpack_bits(self.store.read_raw(stored, start // 8, packed_bytes(stop)), start, stop)

    def _scales(self, name: str, stored: str, start: int, stop: int) -> Floats:
        """Return what each element of a slice is multiplied with: `[1]` or `[stop - start]`."""
        shape = self.base.info(name).shape
        width, count = (shape[-1] if shape else 1), self.store.info(stored).count
        first, last = (start // width, -(-stop // width)) if count > 1 else (0, 1)
        scales = self._floats(stored, first, last)
        return scales if count == 1 else np.repeat(scales, width)[start - first * width : stop - first * width]

    def _product(self, parts: Mapping[str, str], start: int, stop: int) -> Floats:
        """Return a slice of `rows @ cols`, of which only `cols` is kept in memory."""
        cols = self._cols(parts["cols"])
        rank, width = cols.shape
        first, last = start // width, -(-stop // width)
        rows = self._floats(parts["rows"], first * rank, last * rank).reshape(last - first, rank)
        return (rows @ cols).reshape(-1)[start - first * width : stop - first * width]

    def _read_cols(self, stored: str) -> Floats:
        info = self.store.info(stored)
        return self._floats(stored, 0, info.count).reshape(info.shape)

    def _floats(self, stored: str, start: int, stop: int) -> Floats:
        out = np.empty(stop - start, np.float32)
        self.store.read(stored, start, stop, out)
        return out

    @override
    def nbytes(self, name: str) -> int:
        return sum(self.store.info(stored).nbytes for stored in self.parts.get(name, {}).values())

    @override
    def files(self) -> set[Path]:
        return self.store.files()

    @override
    def close(self) -> None:
        self.compressed.close()


def _shapes(part: str, shape: tuple[int, ...], found: Mapping[str, TensorInfo]) -> Sequence[tuple[int, ...]]:
    """Return the shapes that a part of a tensor may have."""
    if part in ("mask", "signs"):
        return [(packed_bytes(prod(shape)),)]
    if part == "scale":
        return [(1,), (prod(shape[:-1]),)]
    if part in ("rows", "cols"):
        rank = found["cols"].shape[0] if found["cols"].shape else 0
        pair = {"rows": (shape[0], rank), "cols": (rank, shape[1])} if len(shape) == 2 else {}
        return [pair[part]] if pair else []
    return [shape]


def open_change(source: str | Path) -> Adapter | Compressed | None:
    """Open a folder that holds a change of a base: a LoRA or compressed deltas; `None` if it is neither."""
    folder = locate(split_task(str(source))[0])
    if is_compressed(folder):
        return open_compressed(source)
    return open_adapter(source) if is_adapter(folder) else None


def on_base(base: Checkpoint, change: Adapter | Compressed) -> AdaptedCheckpoint:
    """Return the full weights of a base and a change of it."""
    return AdaptedCheckpoint(
        CompressedDelta(base, change) if isinstance(change, Compressed) else AdapterDelta(base, change)
    )


@contextmanager
def compressed_writer(
    folder: Path,
    parts: Sequence[TensorInfo],
    *,
    kind: str,
    base_model: str,
    tasks: Mapping[str, str],
    settings: Mapping[str, Any] | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> Iterator[WeightsWriter]:
    """Write a folder of compressed deltas, whose parts the block fills in.

    Args:
        folder: to write in.
        parts: name (by `part_name`), dtype and shape of each.
        kind: how the fine-tunes were compressed, for readers of the config.
        base_model: of all fine-tunes.
        tasks: fine-tunes -> what they are made from.
        settings: more for readers of the config.
        shard_bytes: largest size of a file.
    """
    writer = WeightsWriter(folder, plan_shards(parts, shard_bytes, _STEM))
    try:
        yield writer
        writer.write_index()
    finally:
        writer.close()
    config = {"format": FORMAT, "kind": kind, "base_model": base_model, "tasks": dict(tasks), **(settings or {})}
    write_text(folder / CONFIG, json.dumps(config, indent=2) + "\n")


def part_info(tensor: str, part: str, task: str | None, info: TensorInfo) -> TensorInfo:
    """Return the header entry of a part that has a tensor's dtype and shape."""
    return TensorInfo(part_name(tensor, part, task), info.dtype, info.shape)
