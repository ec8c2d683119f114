"""Read the weights of a model: names, shapes and dtypes at once, data one tensor or one slice at a time.

Data is read with `pread`: memory-mapped pages would count as resident, and the peak of a merge would grow with
the model.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from toolkit.checkpoints.dtypes import Bytes, Floats, by_torch_name, decode
from toolkit.checkpoints.headers import TensorInfo, read_header
from toolkit.checkpoints.layout import tied_source
from toolkit.checkpoints.locate import locate
from toolkit.errors import CheckpointError, MissingError, UnsupportedError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

INDEX = "model.safetensors.index.json"
PICKLE_INDEX = "pytorch_model.bin.index.json"


class Checkpoint:
    """The weights of one model; subclasses know where the bytes are.

    Attributes:
        source: what the user called it, for messages.
        config: the model's `config.json`, empty where there is none.
        tensors: every stored tensor by name, in stored order.
    """

    source: str
    config: dict[str, Any]
    tensors: Mapping[str, TensorInfo]
    folder: Path | None = None

    def info(self, name: str) -> TensorInfo:
        """Return what is known of a tensor; an absent output head is the input embedding it is tied to."""
        return self.tensors[self._stored(name)]

    def has(self, name: str) -> bool:
        """Tell whether the model has a tensor, stored or tied."""
        return name in self.tensors or tied_source(name, self.tensors) is not None

    @property
    def architecture(self) -> str | None:
        """The class that the config names first, if it names any."""
        named = self.config.get("architectures")
        return named[0] if isinstance(named, list) and named and isinstance(named[0], str) else None

    @property
    def ties_head(self) -> bool:
        """Whether the config says that the output head is the input embedding."""
        nested = self.config.get("text_config")
        inner = nested.get("tie_word_embeddings") if isinstance(nested, dict) else None
        return bool(self.config.get("tie_word_embeddings", inner))

    def _stored(self, name: str) -> str:
        if name in self.tensors:
            return name
        tied = tied_source(name, self.tensors)
        if tied is None:
            raise CheckpointError(f"{self.source}: has no tensor {name!r}")
        return tied

    def read_raw(self, name: str, start: int = 0, stop: int | None = None) -> Bytes:
        """Return the stored bytes of elements `start` to `stop` of a tensor, flattened row-major."""
        raise NotImplementedError

    def read(self, name: str, start: int, stop: int, out: Floats) -> None:
        """Read elements `start` to `stop` of a tensor, flattened row-major, as float32 into `out`."""
        decode(self.read_raw(name, start, stop), self.info(name).dtype, out)

    def is_stored(self, name: str) -> bool:
        """Tell whether a tensor's bytes are stored somewhere, and not computed when they are read."""
        return True

    def hides_non_finite(self, name: str) -> bool:
        """Tell whether a tensor was computed from values among which were NaN or infinity that it does not show."""
        return False

    def read_bytes(self, name: str) -> int:
        """Bytes that are read from files to read a tensor once."""
        return self.info(name).nbytes

    def files(self) -> set[Path]:
        """Return the files that what is read depends on."""
        return {info.file for info in self.tensors.values() if info.file}

    @property
    def buffer_bytes(self) -> int:
        """Bytes of memory that one thread needs at most to read, where what is read is computed."""
        return 0

    def tensor(self, name: str) -> torch.Tensor:
        """Return a whole tensor in its own dtype and shape."""
        import torch

        info = self.info(name)
        dtype = getattr(torch, info.dtype.torch, None) if info.dtype.torch else None
        if dtype is None:
            raise UnsupportedError(f"{self.source}: {name}: torch has no dtype for {info.dtype.name}")
        if not info.count:
            return torch.empty(info.shape, dtype=dtype)
        return torch.frombuffer(bytearray(self.read_raw(name)), dtype=dtype).reshape(info.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of all stored tensors."""
        return sum(t.nbytes for t in self.tensors.values())

    @property
    def num_parameters(self) -> int:
        """Elements of all stored floating-point tensors."""
        return sum(t.count for t in self.tensors.values() if t.dtype.floating)

    def close(self) -> None:
        """Close the files."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


class FolderCheckpoint(Checkpoint):
    """A Hugging Face folder, or one safetensors file. Every shard is opened once."""

    def __init__(self, path: Path, source: str = "") -> None:
        self.source = source or str(path)
        self.folder = path if path.is_dir() else path.parent
        self.config = read_json(self.folder / "config.json") if (self.folder / "config.json").is_file() else {}
        self.tensors = _collect(path)
        self._files: dict[Path, int] = {}
        self._lock = threading.Lock()

    def read_raw(self, name: str, start: int = 0, stop: int | None = None) -> Bytes:
        """Return the stored bytes."""
        info = self.info(name)
        first, last = info.dtype.nbytes(start), info.dtype.nbytes(info.count if stop is None else stop)
        assert info.file is not None
        raw = os.pread(self._descriptor(info.file), last - first, info.offset + first)
        while len(raw) < last - first:  # Linux reads at most 2 GiB at once
            more = os.pread(self._descriptor(info.file), last - first - len(raw), info.offset + first + len(raw))
            if not more:
                raise CheckpointError(f"{info.file}: became shorter while it was read")
            raw += more
        return np.frombuffer(raw, np.uint8)

    def _descriptor(self, file: Path) -> int:
        with self._lock:
            if file not in self._files:
                self._files[file] = os.open(file, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
            return self._files[file]

    def close(self) -> None:
        """Close the shards."""
        for descriptor in self._files.values():
            os.close(descriptor)
        self._files.clear()


class MemoryCheckpoint(Checkpoint):
    """The weights of a model in memory: a state dict, or a transformers model."""

    def __init__(self, state: Mapping[str, torch.Tensor], config: dict[str, Any], source: str) -> None:
        self.source = source
        self.config = config
        self._state = dict(state)
        self.tensors = {
            name: TensorInfo(name, by_torch_name(str(value.dtype)), tuple(value.shape))
            for name, value in self._state.items()
        }

    @classmethod
    def of_model(cls, model: PreTrainedModel) -> MemoryCheckpoint:
        """Take the weights of a transformers model as `save_pretrained` would name them.

        transformers renames and fuses some, such as those of experts, when it loads a checkpoint, and undoes it by the
        same mapping when it writes one.
        """
        from transformers.core_model_loading import revert_weight_conversion

        state = dict(model.state_dict())
        tied = getattr(model, "all_tied_weights_keys", None) or {}
        for name in tied:
            state.pop(name, None)
        state = revert_weight_conversion(model, state)
        return cls(state, model.config.to_dict(), type(model).__name__)

    def read_raw(self, name: str, start: int = 0, stop: int | None = None) -> Bytes:
        """Return the bytes of the tensor."""
        import torch

        value = self._state[self._stored(name)].detach().cpu().contiguous().view(-1)
        return value[start:stop].view(torch.uint8).numpy()


def open_checkpoint(source: object, *, allow_pickle: bool = False) -> Checkpoint:
    """Open the weights of a model.

    Args:
        source: a Hugging Face folder, a safetensors file, a hub id, `toolkit:base`, a transformers model, or
            an open checkpoint.
        allow_pickle: also read `pytorch_model.bin`, with `weights_only`.

    Raises:
        MissingError: nothing there.
        CheckpointError: something there that is broken, or holds no weights.
    """
    if isinstance(source, Checkpoint):
        return source
    if not isinstance(source, str | Path):
        if hasattr(source, "state_dict") and hasattr(source, "config"):
            return MemoryCheckpoint.of_model(source)  # pyright: ignore[reportArgumentType]  # just looked
        raise UnsupportedError(f"a model is a path, a hub id or a transformers model, not {type(source).__name__}")
    path = locate(source, allow_pickle=allow_pickle)
    if path.is_dir() and not _weight_files(path):
        pickles = sorted(p.name for p in path.glob("pytorch_model*.bin"))
        if pickles and allow_pickle:
            return _unpickle(path, str(source))
        if pickles:
            raise CheckpointError(
                f"{source}: only pickled weights ({pickles[0]}), which can run code when loaded;"
                " convert them to safetensors, or pass --allow-pickle to read them with weights_only"
            )
        raise MissingError(f"{source}: no safetensors file in this folder")
    return FolderCheckpoint(path, str(source))


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object, or say what is wrong with the file."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise MissingError(f"{path}: no such file") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:  # also of numbers too long, and objects nested too deeply
        raise CheckpointError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(data, dict):
        raise CheckpointError(f"{path}: not a JSON object")
    return data


def _weight_files(folder: Path) -> list[Path]:
    if (folder / INDEX).is_file():
        return [folder / INDEX]
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    return sorted(p for p in folder.glob("*.safetensors") if not p.name.startswith("adapter_model"))


def _collect(path: Path) -> dict[str, TensorInfo]:
    """Gather the tensors of all shards, checking them against the index and each other."""
    files = _weight_files(path) if path.is_dir() else [path]
    indexed: dict[str, str] = {}
    if path.is_dir() and files == [path / INDEX]:
        indexed = _weight_map(path / INDEX)
        files = [path / name for name in sorted(set(indexed.values()))]
        absent = [f.name for f in files if not f.is_file()]
        if absent:
            raise CheckpointError(f"{path}: {len(absent)} of {len(files)} shards are missing: {', '.join(absent[:5])}")
    tensors: dict[str, TensorInfo] = {}
    for file in files:
        for name, info in read_header(file)[0].items():
            if name in tensors:
                raise CheckpointError(f"{path}: tensor {name!r} is in {tensors[name].file} and in {file}")
            tensors[name] = info
    lost = [name for name, shard in indexed.items() if name not in tensors or _shard(tensors[name]) != shard]
    if lost:
        raise CheckpointError(f"{path / INDEX}: {lost[0]!r} is not in {indexed[lost[0]]} ({len(lost)} such tensors)")
    return tensors


def _shard(info: TensorInfo) -> str:
    return info.file.name if info.file else ""


def _weight_map(index: Path) -> dict[str, str]:
    found = read_json(index).get("weight_map")
    if not isinstance(found, dict) or not all(isinstance(v, str) for v in found.values()):
        raise CheckpointError(f"{index}: has no weight_map of names to shards")
    outside = next((v for v in found.values() if Path(v).name != v), None)
    if outside is not None:
        raise CheckpointError(f"{index}: shard {outside!r} is not a file name")
    return found


def _unpickle(folder: Path, source: str) -> Checkpoint:
    import pickle

    import torch

    index = folder / PICKLE_INDEX
    files = sorted(set(_weight_map(index).values())) if index.is_file() else ["pytorch_model.bin"]
    state: dict[str, torch.Tensor] = {}
    for name in files:
        try:
            state |= torch.load(folder / name, map_location="cpu", weights_only=True, mmap=True)
        except FileNotFoundError:
            raise CheckpointError(f"{source}: shard {name} is missing") from None
        except (pickle.UnpicklingError, RuntimeError, ValueError, EOFError) as error:
            reason = str(error).splitlines()[0]
            raise CheckpointError(f"{folder / name}: cannot be read as plain weights ({reason})") from None
    config = folder / "config.json"
    checkpoint = MemoryCheckpoint(state, read_json(config) if config.is_file() else {}, source)
    checkpoint.folder = folder
    return checkpoint
