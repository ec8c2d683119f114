"""Write folders that are whole or absent, and sharded weights into preallocated files.

A folder is made as a hidden sibling, `.NAME.partial`, and renamed when it is complete, so that a kill, a full
disk or an error never leaves half a model under the wanted name.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from toolkit.checkpoints.dtypes import Bytes
from toolkit.checkpoints.headers import TensorInfo, make_header
from toolkit.checkpoints.reader import INDEX
from toolkit.errors import OutputError
from toolkit.tables import human_bytes

SHARD_BYTES = 5_000_000_000
"""Default size of a shard, in bytes, as transformers has it."""

LOCK = ".lock"


def resolved(out: Path) -> Path:
    """Return where an output really is: absolute, without `~` and symbolic links.

    Raises:
        OutputError: its links lead in a circle.
    """
    try:
        return Path(os.path.expanduser(out)).resolve()
    except (OSError, RuntimeError):
        raise OutputError(f"{out}: its symbolic links lead in a circle") from None


def check_free(out: Path, *, overwrite: bool) -> None:
    """Refuse an output that exists, unless it may be overwritten; and one that holds the current folder.

    Raises:
        OutputError: `out` is a file, a folder with something in it, or the current folder or one above it.
    """
    place = resolved(out)
    if place.is_file():
        raise OutputError(f"{out}: is a file; name a folder")
    here = Path.cwd()
    if place == here or place in here.parents:
        what = "is the current folder" if place == here else "holds the current folder"
        raise OutputError(f"{out}: {what}, which cannot be replaced; name a new folder in it, or another one")
    if place.is_dir() and not overwrite and any(place.iterdir()):
        raise OutputError(f"{out}: exists already; name another folder, or pass --overwrite")


def staging_path(out: Path) -> Path:
    """Return the sibling in which `out` is made."""
    place = resolved(out)
    return place.parent / f".{place.name}.partial"


@contextmanager
def staged(out: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Make a folder under another name; rename it to `out` when the block ends, remove it when it fails."""
    check_free(out, overwrite=overwrite)
    with locked(staging_path(out)) as partial:
        clear(partial)
        try:
            yield partial
            commit(partial, out)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise


@contextmanager
def locked(partial: Path) -> Iterator[Path]:
    """Create a staging folder and hold it against other processes.

    Raises:
        OutputError: another process writes there, or it cannot be created.
    """
    try:
        partial.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(partial / LOCK, os.O_CREAT | os.O_RDWR, 0o644)
    except OSError as error:
        raise OutputError(f"{partial.parent}: cannot write there ({error.strerror})") from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield partial
    except BlockingIOError:
        raise OutputError(f"{partial}: another process is writing this output") from None
    finally:
        os.close(descriptor)


def clear(partial: Path) -> None:
    """Remove everything but the lock from a staging folder."""
    for entry in partial.iterdir():
        if entry.is_dir():
            shutil.rmtree(entry)
        elif entry.name != LOCK:
            entry.unlink()


def commit(partial: Path, out: Path) -> None:
    """Rename a finished staging folder to `out`; what stood there goes only once the new one is in place.

    Raises:
        OutputError: it cannot be renamed, as where `out` is a mount point; what stood there still does.
    """
    place = resolved(out)
    old = place.parent / f".{place.name}.old"
    try:
        (partial / LOCK).unlink(missing_ok=True)
        if old.exists():
            shutil.rmtree(old)
        if place.exists():
            place.rename(old)
        _rename(partial, place, old)
    except OSError as error:
        raise OutputError(f"{out}: cannot be put in place ({error.strerror})") from None
    shutil.rmtree(old, ignore_errors=True)


def _rename(partial: Path, place: Path, old: Path) -> None:
    try:
        partial.rename(place)
    except OSError:
        if old.exists():
            old.rename(place)
        raise


def check_space(folder: Path, wanted: int) -> None:
    """Refuse to start what the disk cannot hold."""
    place = resolved(folder)
    existing = next(p for p in (place, *place.parents) if p.exists())
    free = shutil.disk_usage(existing).free
    if free < wanted:
        raise OutputError(f"{folder}: needs {human_bytes(wanted)}, the disk has {human_bytes(free)} free")


def plan_shards(
    tensors: Sequence[TensorInfo], limit: int = SHARD_BYTES, stem: str = "model"
) -> dict[str, list[TensorInfo]]:
    """Distribute tensors over files of at most `limit` bytes, in order; a larger tensor has a file of its own."""
    shards: list[list[TensorInfo]] = [[]]
    size = 0
    for tensor in tensors:
        if shards[-1] and size + tensor.nbytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.nbytes
    if len(shards) == 1:
        return {f"{stem}.safetensors": shards[0]}
    return {f"{stem}-{i + 1:05d}-of-{len(shards):05d}.safetensors": shard for i, shard in enumerate(shards)}


def index_of(shards: Mapping[str, Sequence[TensorInfo]]) -> str:
    """Return the index of weights in several files: which tensor is in which."""
    names = {tensor.name: file for file, tensors in shards.items() for tensor in tensors}
    total = sum(tensor.nbytes for tensors in shards.values() for tensor in tensors)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(names.items()))}
    return json.dumps(index, indent=2) + "\n"


class WeightsWriter:
    """Safetensors files of known layout, filled in any order by any thread.

    Args:
        folder: to write in.
        shards: tensors of each file, from `plan_shards`.
        resume: keep the files that are there.
    """

    def __init__(self, folder: Path, shards: Mapping[str, Sequence[TensorInfo]], *, resume: bool = False) -> None:
        self.folder, self._shards = folder, shards
        self.placed: dict[str, TensorInfo] = {}
        self._files: dict[Path, int] = {}
        for name, tensors in shards.items():
            # Wide elements first, so that every tensor is aligned to its own element.
            header, placed = make_header(sorted(tensors, key=lambda t: -t.dtype.bits), {"format": "pt"})
            path = folder / name
            total = len(header) + sum(t.nbytes for t in placed)
            self._files[path] = _preallocate(path, header, total, resume)
            for t in placed:
                self.placed[t.name] = TensorInfo(t.name, t.dtype, t.shape, path, t.offset)

    def write(self, name: str, start: int, raw: Bytes) -> None:
        """Write the bytes of a slice of a tensor that starts at element `start`."""
        info = self.placed[name]
        assert info.file is not None
        view, offset = memoryview(raw.data), info.offset + info.dtype.nbytes(start)
        try:
            while view:
                done = os.pwrite(self._files[info.file], view, offset)
                view, offset = view[done:], offset + done
        except OSError as error:
            raise OutputError(f"{info.file}: {error.strerror}") from None

    def flush(self) -> None:
        """Force what was written to the disk."""
        for path, descriptor in self._files.items():
            try:
                os.fsync(descriptor)
            except OSError as error:
                raise OutputError(f"{path}: {error.strerror}") from None

    def close(self) -> None:
        """Close the files."""
        for descriptor in self._files.values():
            os.close(descriptor)
        self._files.clear()

    def write_index(self) -> None:
        """Write the index that more than one file needs."""
        if len(self._shards) > 1:
            write_text(self.folder / INDEX, index_of(self._shards))


def write_weights(folder: Path, tensors: Sequence[TensorInfo], data: Mapping[str, Bytes], stem: str = "model") -> None:
    """Write small weights at once; `data` holds the bytes of each tensor."""
    writer = WeightsWriter(folder, plan_shards(tensors, stem=stem))
    try:
        for tensor in tensors:
            writer.write(tensor.name, 0, data[tensor.name])
        writer.write_index()
    finally:
        writer.close()


def write_text(path: Path, text: str) -> None:
    """Write a small file; whoever reads it finds the old text or the new one, never a part."""
    beside = path.with_name(f".{path.name}.partial")
    try:
        beside.write_text(text, encoding="utf-8")
        beside.replace(path)
    except OSError as error:
        raise OutputError(f"{path}: {error.strerror}") from None


def _preallocate(path: Path, header: bytes, total: int, resume: bool) -> int:
    if resume and path.is_file() and path.stat().st_size == total:
        return os.open(path, os.O_RDWR)
    descriptor = os.open(path, os.O_CREAT | os.O_TRUNC | os.O_RDWR, 0o644)
    try:
        if total and hasattr(os, "posix_fallocate"):
            os.posix_fallocate(descriptor, 0, total)
        else:
            os.ftruncate(descriptor, total)
        os.pwrite(descriptor, header, 0)
    except OSError as error:
        os.close(descriptor)
        raise OutputError(f"{path}: cannot reserve {human_bytes(total)} ({error.strerror})") from None
    return descriptor
