"""Identity of folders, and the small checks that all kinds of sources share."""

from __future__ import annotations

import hashlib
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from toolkit.errors import CheckpointError
from toolkit.serving.adapters.target import Target

_READ = ("*.safetensors", "*config.json", "*.index.json")

SETTLED = 2.0
"""Seconds after which a further change of a file shows in its times, on any file system."""


def folder_hash(folder: Path) -> str:
    """Return 32 hex digits over the names and contents of a folder's weights and configs."""
    digest = hashlib.blake2b(digest_size=16)
    for path in sorted({path for pattern in _READ for path in folder.glob(pattern)}):
        digest.update(path.name.encode() + b"\0")
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


class Stamp:
    """What tells without reading them that files are still those that were read.

    Args:
        files: as they are now, before they are read.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        self._files = files
        self._taken = self._look()
        # A file that was written just now could be written once more without its times showing it.
        self._settled = all(time.time() - max(mtime, ctime) / 1e9 > SETTLED for *_, mtime, ctime in self._taken)

    def _look(self) -> list[tuple[int, ...]]:
        stats = [path.stat() for path in self._files]
        return [(s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for s in stats]

    def holds(self) -> bool:
        """Whether nothing can have changed; `False` is no proof that something has."""
        try:
            return self._settled and self._look() == self._taken
        except OSError:
            return False


def check_unchanged(folder: Path, key: str, source: str) -> None:
    """Refuse a folder that is no longer what it was.

    Raises:
        CheckpointError: another hash.
    """
    if folder_hash(folder) != key:
        raise CheckpointError(f"{source}: was changed since it was loaded; load it anew")


def check_shape(shape: Sequence[int], name: str, target: Target, source: str) -> None:
    """Refuse a parameter of another shape than the model's.

    Raises:
        CheckpointError: it has one.
    """
    own = target.parameters[name].shape
    if tuple(shape) != tuple(own):
        raise CheckpointError(f"{source}: stores {name} as {list(shape)}, but in the served model it is {list(own)}")


def by_module(values: Mapping[str, torch.Tensor], target: Target, source: str) -> dict[str, dict[str, torch.Tensor]]:
    """Sort parameters by their modules, leaving out those that are the served model's own.

    A value that the model has under several names, such as a head that is tied to the embedding, counts for all.

    Raises:
        CheckpointError: a parameter that the model lacks or has in another shape.
        UnsupportedError: a module in which requests cannot differ.
    """
    found: dict[str, dict[str, torch.Tensor]] = defaultdict(dict)
    for name, value in values.items():
        if name not in target.parameters:
            raise CheckpointError(f"{source}: stores {name}, which the served model does not have")
        check_shape(value.shape, name, target, source)
        own = target.parameters[name].detach().cpu()
        value = value.to(own.dtype)
        if not torch.equal(value, own):
            for also in (name, *(other for other in target.tied(name) if other not in values)):
                module, parameter = target.owner(also, source)
                found[module][parameter] = value
    return found
