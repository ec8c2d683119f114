"""LoRA folders: pairs for the paged kernel, and what they store whole."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from threading import Lock
from typing import Any, cast

import torch
from torch import nn
from typing_extensions import override

from toolkit.checkpoints.adapters import CONFIG, WEIGHTS, Adapter, LowRank, open_adapter
from toolkit.errors import CheckpointError
from toolkit.kernels.grouped_lora import Pair
from toolkit.serving.adapters.contents import Contents, Source
from toolkit.serving.adapters.folders import Stamp
from toolkit.serving.adapters.target import Target
from toolkit.serving.changes import Replaced


class LoraSource(Source):
    """A LoRA, rsLoRA or DoRA folder of PEFT's.

    Raises:
        CheckpointError: it was made for another base.
        UnsupportedError: it adapts what requests cannot differ in.
    """

    def __init__(self, adapter: Adapter, target: Target) -> None:
        self.folder, self.source = adapter.folder, adapter.source
        self.target, self._adapter = target, adapter
        self._stamp = Stamp([adapter.folder / CONFIG, adapter.folder / WEIGHTS])
        self._reading = Lock()
        self.key, self.description, self.base = adapter.content_hash, adapter.describe(), adapter.base_model
        self.ranks = {name: adapter.rank(name) for name in adapter.parts}
        self.rescaled = {name for name, part in adapter.parts.items() if part.magnitude}
        self.is_exclusive = adapter.is_dora
        self.nbytes = sum(rank * sum(self._check(adapter, name)) for name, rank in self.ranks.items())
        self.nbytes *= target.model.dtype.itemsize
        for name in adapter.whole:
            self._check_whole(adapter, name)

    def _check(self, adapter: Adapter, name: str) -> tuple[int, int]:
        """Return the widths of a module, where the adapter has the same."""
        inputs, outputs = self.target.widths(name, self.source)
        module = self.target.modules[name]
        given = adapter.shape(name)
        stored = isinstance(module, nn.Embedding) or hasattr(module, "nx")
        wanted = (inputs, outputs) if stored else (outputs, inputs)
        if given != wanted or isinstance(module, nn.Embedding) != adapter.parts[name].embedding:
            raise CheckpointError(
                f"{self.source}: changes {name} as {list(given)}, but in the served model it is {list(wanted)}"
            )
        return inputs, outputs

    def _check_whole(self, adapter: Adapter, name: str) -> None:
        module, own = self.target.owner(name, self.source)
        given = adapter.store.info(adapter.whole[name]).shape
        wanted = tuple(getattr(self.target.modules[module], own).shape)
        if given != wanted:
            raise CheckpointError(
                f"{self.source}: stores {name} as {list(given)}, but in the served model it is {list(wanted)}"
            )

    @override
    def read(self) -> Contents:
        with self._reading:
            if not self._stamp.holds():
                self._look_again()
            adapter, dtype = self._adapter, self.target.model.dtype
            with adapter.store:
                pairs = {name: self._pair(adapter, name, dtype) for name in adapter.parts}
                return Contents(pairs, self._whole(adapter))

    def _look_again(self) -> None:
        stamp = Stamp([self.folder / CONFIG, self.folder / WEIGHTS])
        adapter = open_adapter(self.folder)
        if adapter.content_hash != self.key:
            raise CheckpointError(f"{self.source}: was changed since it was loaded; load it anew")
        self._adapter, self._stamp = adapter, stamp

    def _pair(self, adapter: Adapter, name: str, dtype: torch.dtype) -> Pair:
        low_rank, module = adapter.low_rank(name), self.target.modules[name]
        rows, cols = torch.from_numpy(low_rank.rows), torch.from_numpy(low_rank.cols)
        a, b = (rows.T, cols.T) if low_rank.transposed else (cols, rows)
        gain = None if low_rank.magnitude is None else _dora_gain(low_rank, cast(torch.Tensor, module.weight))
        # What some embeddings multiply their rows with, PEFT multiplies the change with too.
        scale = low_rank.scale * float(getattr(module, "embed_scale", 1.0))
        return Pair(a.to(dtype).contiguous(), b.to(dtype).contiguous(), None if gain is None else gain.to(dtype), scale)

    def _whole(self, adapter: Adapter) -> dict[str, Replaced]:
        """Return what is stored whole and is not the model's own; PEFT saves heads that a LoRA targets."""
        found: dict[str, dict[str, torch.Tensor]] = defaultdict(dict)
        for name, stored in adapter.whole.items():
            own = self.target.parameters[name].detach().cpu()
            value = adapter.store.tensor(stored).to(own.dtype)
            if not torch.equal(value, own):
                module, parameter = self.target.owner(name, self.source)
                found[module][parameter] = value
        return {module: Replaced(parameters) for module, parameters in found.items()}


def _dora_gain(low_rank: LowRank, weight: torch.Tensor) -> torch.Tensor:
    """Return the magnitude over the norm of each output of the changed weight."""
    change = torch.from_numpy(low_rank.rows) @ torch.from_numpy(low_rank.cols) * low_rank.scale
    tuned = weight.detach().float().cpu() + change
    assert low_rank.magnitude is not None
    return torch.from_numpy(low_rank.magnitude) / tuned.norm(dim=0 if low_rank.transposed else 1)


def open_lora(folder: Path, target: Target, config: dict[str, Any]) -> LoraSource:
    """Open and check a LoRA folder; see `LoraSource`."""
    adapter = open_adapter(folder)
    with adapter.store:
        return LoraSource(adapter, target)
