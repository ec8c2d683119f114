"""The adapters that the engine holds: which name means which adapter, and which requests still use one.

An adapter is identified by a hash of its content, so a name that is loaded anew is a new adapter: requests that
are under way finish with the one they began with, and nothing cached under the old one can be taken for the new.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from toolkit.checkpoints.adapters import Adapter, LowRank, open_adapter
from toolkit.errors import CheckpointError, RequestError, UnsupportedError
from toolkit.kernels.grouped_lora import Pair
from toolkit.serving.layers import BatchAdapters, MultiAdapterLinear, wrap

RESERVED = ("base", "auto")
_FORBIDDEN = "+:/\\"


@dataclass(frozen=True)
class AdapterInfo:
    """A loaded adapter.

    Attributes:
        name: that requests use.
        key: hash of its content.
        source: folder it came from.
        description: kind, rank, modules.
        base: model that the adapter says it was trained on.
        nbytes: of its factors on the device.
    """

    name: str
    key: str
    source: str
    description: str
    base: str | None
    nbytes: int


class AdapterPool:
    """Adapters by name, their factors in the model's layers by content hash.

    Args:
        model: whose linears are adapted; they are wrapped as adapters ask for them.
        batch: the running step's segments, which the wrapped layers read.

    Attributes:
        infos: by name.
        num_loads: adapters whose factors were read so far.
    """

    def __init__(self, model: PreTrainedModel, batch: BatchAdapters) -> None:
        self.model, self.batch = model, batch
        self.num_loads = 0
        self.infos: dict[str, AdapterInfo] = {}
        self._users: Counter[str] = Counter()
        self._layers: dict[str, list[MultiAdapterLinear]] = {}

    def add(self, name: str, source: str | Path) -> AdapterInfo:
        """Load an adapter under a name; a name that is taken now means the new one.

        Raises:
            RequestError: the name cannot be used.
            MissingError: no such adapter.
            CheckpointError: broken, or made for another base.
            UnsupportedError: a kind that cannot be batched.
        """
        if not name or name in RESERVED or any(c in name for c in _FORBIDDEN) or not name.isprintable():
            raise RequestError(
                f"adapter name {name!r}: use printable characters, and neither {', '.join(RESERVED)} nor any of"
                f" {' '.join(_FORBIDDEN)}"
            )
        adapter = open_adapter(source)
        key = adapter.content_hash
        with adapter.store:
            if key not in self._layers:
                self._layers[key] = self._install(adapter, key)
                self.num_loads += 1
        nbytes = sum(_nbytes(layer.pairs[key]) for layer in self._layers[key])
        old = self.infos.get(name)
        info = AdapterInfo(name, key, str(source), adapter.describe(), adapter.base_model, nbytes)
        self.infos = {**self.infos, name: info}  # other threads may be going through the old one
        if old:
            self._drop_unused(old.key)
        return info

    def remove(self, name: str) -> None:
        """Forget a name; the factors go when no request uses them.

        Raises:
            RequestError: no such adapter.
        """
        if name not in self.infos:
            raise RequestError(f"no adapter {name!r}", "model_not_found")
        key = self.infos[name].key
        self.infos = {other: info for other, info in self.infos.items() if other != name}
        self._drop_unused(key)

    def acquire(self, name: str) -> str:
        """Return the key of a name and hold the adapter for one request."""
        key = self.infos[name].key
        self._users[key] += 1
        return key

    def release(self, key: str) -> None:
        """Give up one request's hold."""
        self._users[key] -= 1
        self._drop_unused(key)

    def _drop_unused(self, key: str) -> None:
        if self._users[key] <= 0 and not any(info.key == key for info in self.infos.values()):
            for layer in self._layers.pop(key, []):
                del layer.pairs[key]
            del self._users[key]

    def _install(self, adapter: Adapter, key: str) -> list[MultiAdapterLinear]:
        """Put an adapter's factors into the layers; check all of them before any is changed."""
        changed = [name for name in sorted(adapter.whole) if not self._is_copy(adapter, name)]
        if changed:
            raise UnsupportedError(
                f"{adapter.source}: stores {', '.join(changed[:3])} whole, which cannot be batched;"
                " merge it into the base"
            )
        modules = {name: self._module(adapter, name) for name in adapter.parts}
        pairs = {name: self._pair(adapter, name, module) for name, module in modules.items()}
        head = self.model.get_output_embeddings()
        layers = []
        for name, pair in pairs.items():
            layer = wrap(self.model, name, self.batch, head)
            layer.pairs[key] = pair
            layers.append(layer)
        return layers

    def _is_copy(self, adapter: Adapter, name: str) -> bool:
        """Tell whether a stored tensor is the model's own; PEFT saves embeddings and heads that a LoRA targets."""
        module, _, parameter = name.rpartition(".")
        try:
            own = getattr(self.model.get_submodule(module), parameter)
        except AttributeError:
            raise CheckpointError(f"{adapter.source}: stores {name}, which the served model does not have") from None
        stored = adapter.store.tensor(adapter.whole[name]).to(own.device, own.dtype)
        return stored.shape == own.shape and torch.equal(stored, own)

    def _module(self, adapter: Adapter, name: str) -> nn.Module:
        try:
            module = self.model.get_submodule(name)
        except AttributeError:
            raise CheckpointError(f"{adapter.source}: adapts {name}, which the served model does not have") from None
        if isinstance(module, MultiAdapterLinear):
            module = module.base
        weight = getattr(module, "weight", None)
        if adapter.parts[name].embedding or not isinstance(weight, torch.Tensor):
            raise UnsupportedError(f"{adapter.source}: adapts {name}, which is no linear layer")
        shape = tuple(weight.shape)
        low_rank = adapter.low_rank(name)
        if shape != low_rank.shape:
            given = list(low_rank.shape)
            raise CheckpointError(
                f"{adapter.source}: changes {name} as {given}, but in the served model it is {list(shape)}"
            )
        return module

    @staticmethod
    def _pair(adapter: Adapter, name: str, module: nn.Module) -> Pair:
        low_rank = adapter.low_rank(name)
        weight = module.weight
        assert isinstance(weight, torch.Tensor)
        rows, cols = torch.from_numpy(low_rank.rows), torch.from_numpy(low_rank.cols)
        a, b = (rows.T, cols.T) if low_rank.transposed else (cols, rows)
        gain = _dora_gain(low_rank, weight) if low_rank.magnitude is not None else None
        place = {"device": weight.device, "dtype": weight.dtype}
        return Pair(
            a.contiguous().to(**place),
            (b * low_rank.scale).contiguous().to(**place),
            None if gain is None else gain.to(**place),
        )


def _dora_gain(low_rank: LowRank, weight: torch.Tensor) -> torch.Tensor:
    """Return the magnitude over the norm of each output of the changed weight."""
    change = torch.from_numpy(low_rank.rows) @ torch.from_numpy(low_rank.cols) * low_rank.scale
    tuned = weight.detach().float().cpu() + change
    assert low_rank.magnitude is not None
    return torch.from_numpy(low_rank.magnitude) / tuned.norm(dim=0 if low_rank.transposed else 1)


def _nbytes(pair: Pair) -> int:
    return sum(t.nbytes for t in (pair.a_rK, pair.b_Nr, pair.gain_N) if t is not None)
