"""Deltas: what a fine-tune changed of its base, readable one slice of one tensor at a time.

Slices follow `chunks`, which cuts a tensor at row boundaries. Products of low-rank pairs are always computed
over those same blocks, so the bytes of a result do not depend on who asks for which slice.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from math import prod
from pathlib import Path

import numpy as np
from typing_extensions import override

from toolkit.checkpoints.adapters import Adapter, LowRank
from toolkit.checkpoints.dtypes import Bytes, Floats
from toolkit.checkpoints.reader import Checkpoint
from toolkit.errors import CheckpointError, UnsupportedError

CHUNK = 65536
"""Elements that are worked on at a time; small enough for the caches of a core."""


def chunks(shape: tuple[int, ...], *, whole_rows: bool = False) -> Iterator[tuple[int, int]]:
    """Cut a tensor into flat ranges of whole rows.

    Args:
        shape: of the tensor; a row is its last dimension.
        whole_rows: never cut a row; otherwise one longer than a chunk is cut as well, and so is a vector.
    """
    count, row = prod(shape), shape[-1] if shape else 1
    by_rows = whole_rows or (len(shape) > 1 and row <= CHUNK)
    step = max(1, CHUNK // max(1, row)) * row if by_rows else CHUNK
    for start in range(0, count, max(1, step)):
        yield start, min(start + step, count)


class Delta:
    """What one fine-tune changed of `base`."""

    def __init__(self, base: Checkpoint, source: str) -> None:
        self.base, self.source = base, source

    def touches(self, name: str) -> bool:
        """Tell whether a tensor can differ from the base's."""
        raise NotImplementedError

    def read(self, name: str, start: int, stop: int, base: Floats, out: Floats) -> None:
        """Read a slice of the change of a tensor.

        Args:
            name: of a tensor of the base.
            start: first element of the slice, flattened; with `stop` one of the tensor's `chunks`.
            stop: end of the slice.
            base: `[N]`, the base's own values of the slice.
            out: `[N]`, overwritten with `tuned - base`, computed in float32.
        """
        raise NotImplementedError

    def nbytes(self, name: str) -> int:
        """Bytes to read for a tensor."""
        raise NotImplementedError

    def files(self) -> set[Path]:
        """Return the files that hold the change."""
        raise NotImplementedError

    def close(self) -> None:
        """Close the files that hold the change; the base stays open."""


class DenseDelta(Delta):
    """The difference of two full checkpoints."""

    def __init__(self, base: Checkpoint, tuned: Checkpoint) -> None:
        super().__init__(base, tuned.source)
        self.tuned = tuned

    @override
    def touches(self, name: str) -> bool:
        return self.tuned is not self.base

    @override
    def read(self, name: str, start: int, stop: int, base: Floats, out: Floats) -> None:
        self.tuned.read(name, start, stop, out)
        np.subtract(out, base, out=out)

    @override
    def nbytes(self, name: str) -> int:
        return self.tuned.read_bytes(name)

    @override
    def files(self) -> set[Path]:
        return self.tuned.files()

    @override
    def close(self) -> None:
        self.tuned.close()


class AdapterDelta(Delta):
    """The change that a LoRA makes, computed from its factors; never rounded to the base's dtype."""

    def __init__(self, base: Checkpoint, adapter: Adapter) -> None:
        super().__init__(base, adapter.source)
        self.adapter = adapter
        self._check()
        self._low_rank = lru_cache(maxsize=4)(adapter.low_rank)
        self._dora_norm = lru_cache(maxsize=4)(self._norm_per_output)

    def _check(self) -> None:
        for name, module in self.adapter.targets.items():
            if not self.base.has(name):
                raise CheckpointError(f"{self.source}: adapts {module}, which {self.base.source} does not have")
        for name, stored in self.adapter.whole.items():
            shape = self.adapter.store.info(stored).shape
            if not self.base.has(name) or self.base.info(name).shape != shape:
                raise CheckpointError(
                    f"{self.source}: stores {name} {list(shape)}, which does not fit {self.base.source}"
                )
        for name, module in self.adapter.targets.items():
            given, wanted = self._shape(module), self.base.info(name).shape
            if given != wanted:
                raise CheckpointError(
                    f"{self.source}: changes {name} as {list(given)}, but in {self.base.source} it is {list(wanted)}"
                )

    def _shape(self, module: str) -> tuple[int, ...]:
        part, store = self.adapter.parts[module], self.adapter.store
        out_in = store.info(part.b).shape[0], store.info(part.a).shape[1]
        flipped = part.embedding or bool(self.adapter.config.get("fan_in_fan_out"))
        return out_in[::-1] if flipped else out_in

    @override
    def touches(self, name: str) -> bool:
        return name in self.adapter.touched

    @override
    def read(self, name: str, start: int, stop: int, base: Floats, out: Floats) -> None:
        stored, module = self.adapter.whole.get(name), self.adapter.targets.get(name)
        if stored is not None:
            self.adapter.store.read(stored, start, stop, out)
            np.subtract(out, base, out=out)
        else:
            out.fill(0)
        if module is None:
            return
        pair = self._low_rank(module)
        if pair.magnitude is not None:
            self._read_dora(name, pair, start, stop, base, out)
        else:
            out += _product(pair, start, stop)

    def _read_dora(self, name: str, pair: LowRank, start: int, stop: int, base: Floats, out: Floats) -> None:
        """DoRA rescales each output of `base + delta` to its own norm."""
        tuned = base + out + _product(pair, start, stop)
        norm = self._dora_norm(name)
        assert pair.magnitude is not None
        factor = pair.magnitude / norm
        width = pair.shape[1]
        index = np.arange(start, stop)
        tuned *= factor[index % width if pair.transposed else index // width]
        np.subtract(tuned, base, out=out)

    def _norm_per_output(self, name: str) -> Floats:
        """Return the norm per output of `base + scale * rows @ cols`."""
        pair = self._low_rank(self.adapter.targets[name])
        squares = np.zeros(pair.shape[1] if pair.transposed else pair.shape[0], np.float64)
        width = pair.shape[1]
        for start, stop in chunks(pair.shape):
            block = np.empty(stop - start, np.float32)
            self.base.read(name, start, stop, block)
            block += _product(pair, start, stop)
            index = np.arange(start, stop)
            where = index % width if pair.transposed else index // width
            squares += np.bincount(where, weights=np.square(block, dtype=np.float64), minlength=len(squares))
        return np.sqrt(squares).astype(np.float32)

    @override
    def nbytes(self, name: str) -> int:
        module, stored = self.adapter.targets.get(name), self.adapter.whole.get(name)
        store = self.adapter.store
        total = store.info(stored).nbytes if stored else 0
        if module:
            part = self.adapter.parts[module]
            total += store.info(part.a).nbytes + store.info(part.b).nbytes
        return total

    @override
    def files(self) -> set[Path]:
        return self.adapter.store.files()

    @override
    def close(self) -> None:
        self.adapter.close()


def _product(pair: LowRank, start: int, stop: int) -> Floats:
    """Return elements `start` to `stop` of `scale * rows @ cols`, flattened."""
    width = pair.shape[1]
    first, last = start // width, -(-stop // width)
    if last - first == 1:
        block = pair.rows[first] @ pair.cols[:, start - first * width : stop - first * width]
    else:
        block = (pair.rows[first:last] @ pair.cols).reshape(-1)[start - first * width : stop - first * width]
    return np.multiply(block, np.float32(pair.scale), out=block)


class AdaptedCheckpoint(Checkpoint):
    """The full weights of a base with a change on it, rounded to float32 only.

    Args:
        delta: the change.
    """

    def __init__(self, delta: Delta) -> None:
        self.delta, self.source = delta, delta.source
        self.config, self.tensors, self.folder = delta.base.config, delta.base.tensors, delta.base.folder

    @override
    def is_stored(self, name: str) -> bool:
        return not self.delta.touches(name) and self.delta.base.is_stored(name)

    @override
    def read_raw(self, name: str, start: int = 0, stop: int | None = None) -> Bytes:
        """Return the base's bytes of a tensor that the change leaves alone."""
        if self.delta.touches(name):
            raise UnsupportedError(f"{self.source}: {name} is computed, not stored; read it as float32")
        return self.delta.base.read_raw(name, start, stop)

    @override
    def read(self, name: str, start: int, stop: int, out: Floats) -> None:
        """Read base plus change; `start` to `stop` is one of the tensor's `chunks`."""
        self.delta.base.read(name, start, stop, out)
        if self.delta.touches(name):
            change = np.empty_like(out)
            self.delta.read(name, start, stop, out, change)
            np.add(out, change, out=out)

    @override
    def read_bytes(self, name: str) -> int:
        return self.delta.base.read_bytes(name) + (self.delta.nbytes(name) if self.delta.touches(name) else 0)

    @override
    def files(self) -> set[Path]:
        return self.delta.base.files() | self.delta.files()

    @property
    @override
    def buffer_bytes(self) -> int:
        return self.delta.base.buffer_bytes

    @override
    def close(self) -> None:
        """Close the files of the base and of the change."""
        self.delta.base.close()
        self.delta.close()
