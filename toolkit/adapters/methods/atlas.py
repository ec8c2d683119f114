"""aTLAS: a model composed of other fine-tunes of its base; the only weights are their coefficients.

The change of a linear's weight is `sum_i c_i tau_i`, where `tau_i` is what the i-th fine-tune changed of it and `c_i`
one trained number per fine-tune and linear, 0 at the start. The fine-tunes stay where they are and are read again when
the adapter is loaded; the checkpoint holds the coefficients alone. They are in memory as dense matrices: `toolkit
learn` finds the same coefficients with them on disk, of all tensors and not of linears alone.

Zhang et al., "Knowledge Composition using Task Vectors with Learned Anisotropic Scaling", 2024, arXiv:2407.02880.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from toolkit.adapters.methods._base import AdapterConfig, AdapterLayer, Site, WeightChange, register
from toolkit.checkpoints.compressed import Compressed, CompressedDelta, open_change
from toolkit.checkpoints.deltas import AdapterDelta, Delta, DenseDelta, chunks
from toolkit.checkpoints.reader import Checkpoint, MemoryCheckpoint, open_checkpoint


@dataclass
class AtlasConfig(AdapterConfig):
    """aTLAS.

    Attributes:
        vectors: fine-tunes of the base: full checkpoints, LoRA folders, `FOLDER#TASK` of compressed deltas. What they
            changed besides the adapted linears is left out.
    """

    vectors: list[str] = field(default_factory=list)

    def resolve(self, model: nn.Module) -> None:
        """Open the fine-tunes over the weights of the model."""
        if not self.vectors:
            raise ValueError("vectors: atlas needs at least one fine-tune of the base")
        self.opened = _Opened(self.vectors, model)


class _Opened:
    """Fine-tunes whose files can be read; no part of a configuration's file or of its copies."""

    def __init__(self, sources: list[str], model: nn.Module) -> None:
        self.base = _base_of(model)
        self.deltas = [_open(source, self.base) for source in sources]

    def __deepcopy__(self, memo: dict[int, Any]) -> _Opened:
        return self

    def count(self, name: str) -> int:
        """Return how many fine-tunes can have changed a tensor."""
        return sum(delta.touches(name) for delta in self.deltas)

    def read(self, name: str) -> Tensor:
        """Return what those changed of it, `[n, *shape]` as it is stored, float32.

        Raises:
            ValueError: a full checkpoint of another model.
        """
        info = self.base.info(name)
        touching = [delta for delta in self.deltas if delta.touches(name)]
        found, own = np.empty((len(touching), info.count), np.float32), np.empty(info.count, np.float32)
        for delta, values in zip(touching, found, strict=True):
            if isinstance(delta, DenseDelta) and delta.tuned.info(name).shape != info.shape:
                given = list(delta.tuned.info(name).shape)
                raise ValueError(f"{delta.source}: the weight is {given}, and the model's {list(info.shape)}")
            for start, stop in chunks(info.shape):
                self.base.read(name, start, stop, own[start:stop])
                delta.read(name, start, stop, own[start:stop], values[start:stop])
            delta.close()  # its files are opened again for the next tensor
        return torch.from_numpy(found).reshape(-1, *info.shape)


def _base_of(model: nn.Module) -> Checkpoint:
    """Return the weights of a model by the names and with the values that it has without adapters."""
    state = {n.replace(".base_layer.", "."): value for n, value in model.named_parameters() if value.ndim}
    for key, layer in model.named_modules():
        if isinstance(layer, AdapterLayer):
            state |= {f"{key}.{name}": value for name, value in layer._before_merge.items()}
    return MemoryCheckpoint(state, {}, type(model).__name__)


def _open(source: str, base: Checkpoint) -> Delta:
    change = open_change(source)
    if change is None:
        return DenseDelta(base, open_checkpoint(source))
    return CompressedDelta(base, change) if isinstance(change, Compressed) else AdapterDelta(base, change)


class AtlasLinear(AdapterLayer):
    """A linear whose change is a weighted sum of those of other fine-tunes."""

    TRAINED = ("coefficients",)

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__(base_layer)
        # In a plain dict: no part of a checkpoint, and moved to the device that they are used on.
        self.vectors: dict[str, Tensor] = {}
        self.other_param_names = (*self.other_param_names, "vectors")

    def start(self, config: AtlasConfig, site: Site) -> Mapping[str, Tensor]:
        """Set the coefficients `[n]` of the fine-tunes that changed this linear to 0."""
        count = config.opened.count(f"{site.key}.weight")
        return {"coefficients": torch.zeros(count)} if count else {}

    def add(self, adapter: str, config: Any, site: Site) -> None:
        """Make a new adapter on this layer, and read its task vectors `[n, out, in]`."""
        super().add(adapter, config, site)
        if self.has(adapter, "coefficients"):
            found = config.opened.read(f"{site.key}.weight")
            self.vectors[adapter] = found.mT if isinstance(self.get_base_layer(), Conv1D) else found

    def change(self, adapter: str, x: Tensor, y: Tensor) -> Tensor:
        """Return `sum_i c_i tau_i x`."""
        if adapter not in self.vectors:
            return y.new_zeros(())
        return functional.linear(x, self._sum(adapter, x.device).to(x.dtype))

    def fold(self, adapter: str) -> WeightChange:
        """Return `sum_i c_i tau_i`."""
        weight = self.base_weight
        return WeightChange(self._sum(adapter, weight.device) if adapter in self.vectors else torch.zeros_like(weight))

    def _sum(self, adapter: str, device: torch.device) -> Tensor:
        vectors = self.vectors[adapter] = self.vectors[adapter].to(device)
        return torch.einsum("n,noi->oi", self.tensor(adapter, "coefficients").float(), vectors)


register("atlas", AtlasConfig, AtlasLinear)
