"""A checkpoint that shows another one: with other names, units in another order, another vocabulary."""

from __future__ import annotations

from pathlib import Path

from typing_extensions import override

from toolkit.checkpoints.dtypes import Bytes, Floats
from toolkit.checkpoints.reader import Checkpoint


class CheckpointView(Checkpoint):
    """Another checkpoint; subclasses override what they show differently.

    Args:
        inner: the checkpoint.
    """

    def __init__(self, inner: Checkpoint) -> None:
        self.inner = inner
        self.source, self.config, self.folder, self.tensors = inner.source, inner.config, inner.folder, inner.tensors

    def _inside(self, name: str) -> str:
        """Return what the inner checkpoint calls a tensor."""
        return self._stored(name)

    @override
    def read_raw(self, name: str, start: int = 0, stop: int | None = None) -> Bytes:
        return self.inner.read_raw(self._inside(name), start, stop)

    @override
    def read(self, name: str, start: int, stop: int, out: Floats) -> None:
        self.inner.read(self._inside(name), start, stop, out)

    @override
    def is_stored(self, name: str) -> bool:
        return self.inner.is_stored(self._inside(name))

    @override
    def hides_non_finite(self, name: str) -> bool:
        return self.inner.hides_non_finite(self._inside(name))

    @override
    def read_bytes(self, name: str) -> int:
        return self.inner.read_bytes(self._inside(name))

    @override
    def files(self) -> set[Path]:
        return self.inner.files()

    @property
    @override
    def buffer_bytes(self) -> int:
        return self.inner.buffer_bytes

    @override
    def close(self) -> None:
        self.inner.close()
