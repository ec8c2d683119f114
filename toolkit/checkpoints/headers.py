"""The safetensors container: parse and check a file's header, or make one, without touching the data.

Layout of a file: 8 bytes, the header's length as a little-endian integer; the header, a JSON object of
`name -> {dtype, shape, data_offsets}`; then the data, which the offsets must cover without gap or overlap.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from toolkit.checkpoints.dtypes import DTYPES, DType
from toolkit.errors import CheckpointError, MissingError

MAX_HEADER = 100_000_000
"""Longest header that the format allows, in bytes."""


@dataclass(frozen=True)
class TensorInfo:
    """What a header says of one tensor.

    Attributes:
        name: of the tensor in its model.
        dtype: storage format.
        shape: sizes, row-major.
        file: that holds the data; `None` where the tensor is in memory.
        offset: of its first byte in the file.
    """

    name: str
    dtype: DType
    shape: tuple[int, ...]
    file: Path | None = None
    offset: int = 0

    @property
    def count(self) -> int:
        """Number of elements."""
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the data."""
        return self.dtype.nbytes(self.count)


def read_header(path: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """Read and check the header of a file.

    Returns:
        The tensors in the order of their data, and the file's metadata.

    Raises:
        MissingError: no such file.
        CheckpointError: the file is truncated, or its header is not what the format demands.
    """
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            start = file.read(8)
            length = int.from_bytes(start, "little")
            if start[:8] == b"version ":
                raise CheckpointError(f"{path}: a Git LFS pointer, not the weights; run `git lfs pull`")
            if len(start) < 8 or length > MAX_HEADER or 8 + length > size:
                raise CheckpointError(f"{path}: truncated, or not a safetensors file ({size} bytes)")
            text = file.read(length)
    except FileNotFoundError:
        raise MissingError(f"{path}: no such file") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from None
    entries = _parse(text, path)
    metadata = entries.pop("__metadata__", {})
    tensors = [_tensor(name, entry, path, 8 + length) for name, entry in entries.items()]
    tensors.sort(key=lambda t: (t.offset, t.nbytes))
    _check_cover(tensors, 8 + length, size, path)
    return {t.name: t for t in tensors}, metadata if isinstance(metadata, dict) else {}


def make_header(tensors: Iterable[TensorInfo], metadata: Mapping[str, str]) -> tuple[bytes, list[TensorInfo]]:
    """Lay tensors out one after another.

    Returns:
        The bytes that start the file, and the tensors with their offsets in it.
    """
    entries: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    position = 0
    ordered = list(tensors)
    for t in ordered:
        entries[t.name] = {"dtype": t.dtype.name, "shape": t.shape, "data_offsets": (position, position + t.nbytes)}
        position += t.nbytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    placed, offset = [], 8 + len(text)
    for t in ordered:
        placed.append(TensorInfo(t.name, t.dtype, t.shape, t.file, offset))
        offset += t.nbytes
    return len(text).to_bytes(8, "little") + text, placed


def _parse(text: bytes, path: Path) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        seen = dict(pairs)
        if len(seen) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise CheckpointError(f"{path}: the header names {twice!r} twice")
        return seen

    try:
        entries = json.loads(text, object_pairs_hook=unique)
    except CheckpointError:
        raise
    except (ValueError, RecursionError) as error:  # also of numbers too long, and objects nested too deeply
        raise CheckpointError(f"{path}: the header is not valid JSON ({error})") from None
    if not isinstance(entries, dict):
        raise CheckpointError(f"{path}: the header is not a JSON object")
    return entries


def _tensor(name: str, entry: Any, path: Path, start: int) -> TensorInfo:
    def bad(what: str) -> CheckpointError:
        return CheckpointError(f"{path}: tensor {name!r}: {what}")

    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise bad("the header entry lacks dtype, shape or data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise bad(f"unknown dtype {dtype!r}")
    if not _are_sizes(shape):
        raise bad(f"shape {shape!r} is not a list of sizes")
    if not _are_sizes(offsets) or len(offsets) != 2:
        raise bad(f"data_offsets {offsets!r} are not two positions")
    info = TensorInfo(name, DTYPES[dtype], tuple(shape), path, start + offsets[0])
    if info.count >= 1 << 63:
        raise bad(f"shape {shape!r} has more elements than any file")
    if offsets[1] - offsets[0] != info.nbytes:
        raise bad(
            f"{dtype} of shape {list(shape)} takes {info.nbytes} bytes, the header gives it {offsets[1] - offsets[0]}"
        )
    return info


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(size) is int and 0 <= size < 1 << 63 for size in value)


def _check_cover(tensors: list[TensorInfo], start: int, size: int, path: Path) -> None:
    position = start
    for t in tensors:
        if t.offset != position:
            what = "overlaps another tensor" if t.offset < position else "leaves a gap before it"
            raise CheckpointError(f"{path}: tensor {t.name!r} {what}")
        position += t.nbytes
    if position > size:
        raise CheckpointError(f"{path}: truncated: the header promises {position} bytes, the file has {size}")
    if position < size:
        raise CheckpointError(f"{path}: {size - position} bytes after the last tensor that no header entry names")
