"""Full fine-tunes of the served base: checkpoints, of which what is the base's own is shared, and compressed deltas.

Tensors with the same bytes are kept once, whichever fine-tunes they come from (Lin et al., "BlockLLM: Multi-tenant
Finer-grained Serving for Large Language Models", 2024, arXiv:2404.18322, shares blocks among fine-tunes). Compressed
deltas stay compressed: of a linear, what one bit per weight stands for is added to its outputs; other modules' weights
are rebuilt while they run, and thrown away.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from weakref import WeakValueDictionary

import torch
from torch import nn
from typing_extensions import override

from toolkit.checkpoints.compressed import Compressed, open_compressed
from toolkit.checkpoints.reader import open_checkpoint
from toolkit.errors import CheckpointError
from toolkit.kernels.delta_linear import BitDeltas
from toolkit.kernels.grouped_lora import Pair
from toolkit.serving.adapters.contents import Contents, Source
from toolkit.serving.adapters.folders import by_module, check_shape, check_unchanged, folder_hash
from toolkit.serving.adapters.target import Target
from toolkit.serving.changes import BitChange, Change, Rebuilt, Replaced


class SharedTensors:
    """Tensors by their content, each once as long as somebody uses it."""

    def __init__(self) -> None:
        self._known: WeakValueDictionary[bytes, torch.Tensor] = WeakValueDictionary()

    def one(self, value: torch.Tensor) -> torch.Tensor:
        """Return the tensor that is known with the same content, or this one."""
        flat = value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
        digest = hashlib.blake2b(f"{value.dtype} {tuple(value.shape)}".encode(), digest_size=16)
        digest.update(flat.data)
        return self._known.setdefault(digest.digest(), value)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors that are in use."""
        return sum(value.nbytes for value in list(self._known.values()))


class _TunedSource(Source):
    """What both kinds have in common."""

    def __init__(self, folder: Path, source: str, target: Target, shared: SharedTensors) -> None:
        self.folder, self.source, self.target, self.shared = folder, source, target, shared
        self.content = folder_hash(folder)
        self.key = self.content


class CheckpointSource(_TunedSource):
    """A full fine-tune as a folder of weights.

    Raises:
        CheckpointError: it is no fine-tune of the served base.
        UnsupportedError: it changes what requests cannot differ in.
    """

    def __init__(self, folder: Path, source: str, target: Target, shared: SharedTensors) -> None:
        super().__init__(folder, source, target, shared)
        with open_checkpoint(folder) as checkpoint:
            self.nbytes = checkpoint.nbytes
            missing = [name for name in target.parameters if not any(map(checkpoint.has, (name, *target.tied(name))))]
            if missing:
                raise CheckpointError(f"{source}: lacks {missing[0]}, so it is no fine-tune of the served model")
            for name in filter(checkpoint.has, target.parameters):
                check_shape(checkpoint.info(name).shape, name, target, source)
        self.description = "full fine-tune"

    @override
    def read(self) -> Contents:
        check_unchanged(self.folder, self.content, self.source)
        with open_checkpoint(self.folder) as checkpoint:
            values = {name: checkpoint.tensor(name) for name in checkpoint.tensors if name in self.target.parameters}
        changed = by_module(values, self.target, self.source)
        own = {module: {n: self.shared.one(v) for n, v in values.items()} for module, values in changed.items()}
        return Contents(changes={module: Replaced(values) for module, values in own.items()})


class CompressedSource(_TunedSource):
    """One fine-tune of a folder of compressed deltas.

    Raises:
        CheckpointError: it was made for another base.
        UnsupportedError: it changes what requests cannot differ in.
    """

    def __init__(self, compressed: Compressed, target: Target, shared: SharedTensors) -> None:
        super().__init__(compressed.folder, compressed.source, target, shared)
        self.task = compressed.task
        self.parts = {name: dict(parts) for name, parts in compressed.parts.items()}
        self.key = hashlib.blake2b(f"{self.content} {self.task}".encode(), digest_size=16).hexdigest()
        self.nbytes = sum(compressed.store.info(s).nbytes for parts in self.parts.values() for s in parts.values())
        self.base, self.description = compressed.base_model, f"{self.task}: {compressed.describe()}"
        for name in self.parts:
            target.owner(name, self.source)
        factored = {name.rpartition(".")[0]: parts["rows"] for name, parts in self.parts.items() if "rows" in parts}
        self.ranks = {module: compressed.store.info(stored).shape[1] for module, stored in factored.items()}

    @override
    def read(self) -> Contents:
        check_unchanged(self.folder, self.content, self.source)
        pairs: dict[str, Pair] = {}
        whole: dict[str, dict[str, torch.Tensor]] = defaultdict(dict)
        rebuilt: dict[str, dict[str, _Rebuild]] = defaultdict(dict)
        compressed = open_compressed(f"{self.folder}#{self.task}")
        with compressed.store as store:
            for name, parts in self.parts.items():
                tensors = {part: self.shared.one(store.tensor(stored)) for part, stored in parts.items()}
                for also in (name, *(other for other in self.target.tied(name) if other not in self.parts)):
                    module, own = self.target.owner(also, self.source)
                    if "rows" in tensors:
                        pairs[module] = self._pair(module, tensors)
                    elif "whole" in tensors:
                        whole[module][own] = tensors["whole"].to(self.target.model.dtype)
                    else:
                        rebuilt[module][own] = _Rebuild(tensors)
        changes: dict[str, Change] = {m: Replaced(values) for m, values in whole.items() if m not in rebuilt}
        for module, makers in rebuilt.items():
            kept = {name: _Rebuild({"whole": value}) for name, value in whole.get(module, {}).items()}
            own = {**makers, **kept}
            changes[module] = _bit_change(self.target.modules[module], own) or Rebuilt(own)
        return Contents(pairs, changes)

    def _pair(self, module: str, parts: Mapping[str, torch.Tensor]) -> Pair:
        dtype, (inputs, _) = self.target.model.dtype, self.target.widths(module, self.source)
        rows, cols = parts["rows"].to(dtype), parts["cols"].to(dtype)
        # Conv1D and embeddings store their weight transposed.
        transposed = hasattr(self.target.modules[module], "nx") or hasattr(
            self.target.modules[module], "num_embeddings"
        )
        a, b = (rows.T, cols.T) if transposed else (cols, rows)
        assert a.shape[1] == inputs, "opening has checked it"
        return Pair(a.contiguous(), b.contiguous())


@dataclass(frozen=True)
class _Rebuild:
    """How a parameter is rebuilt from the parts of a compressed folder; see `checkpoints.compressed` for the forms."""

    parts: Mapping[str, torch.Tensor]

    def to(self, device: torch.device) -> _Rebuild:
        """See `changes.Recipe`."""
        return _Rebuild({name: value.to(device) for name, value in self.parts.items()})

    def make(self, base: torch.Tensor) -> torch.Tensor:
        """See `changes.Recipe`."""
        parts = self.parts
        if "whole" in parts:
            return parts["whole"].to(base.dtype)
        if "change" in parts:
            change = parts["change"].float()
        elif "mask" in parts:
            change = _bits(parts["mask"], base) * parts["vector"].float()
        elif "signs" in parts:
            change = _bits(parts["signs"], base) * 2.0 - 1.0
        else:
            change = parts["levels"].float()
        if "scale" in parts:
            scale = parts["scale"].float()
            change = change * (scale if scale.numel() == 1 else scale.view(*base.shape[:-1], 1))
        return (base.float() + change).to(base.dtype)


def _bit_change(module: nn.Module, recipes: Mapping[str, _Rebuild]) -> BitChange | None:
    """Return a linear's change where it is one bit per weight and nothing else."""
    parts = recipes["weight"].parts if recipes.keys() == {"weight"} else {}
    bits = parts.get("mask", parts.get("signs"))
    if bits is None or not isinstance(module, nn.Linear):
        return None
    shape = module.out_features, module.in_features
    return BitChange(BitDeltas.of_one(bits, shape, parts.get("scale"), parts.get("vector")))


def _bits(packed: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Return packed bits as zeros and ones in a parameter's shape, the lowest bit of each byte first."""
    shifts = torch.arange(8, dtype=torch.uint8, device=packed.device)
    return (packed.unsqueeze(1) >> shifts & 1).view(-1)[: like.numel()].view(like.shape)
