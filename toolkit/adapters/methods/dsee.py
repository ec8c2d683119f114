"""DSEE: a low-rank and a sparse change, trained on a base that is pruned.

`y = (W * S1) x + s U V x + S2 x + b`. S2 has a few entries, whose places are found by decomposing `W` and then fixed.
S1 is found after a first training: `prune` removes the smallest entries of all adapted weights together, with the
changes added in, and training goes on. Structured pruning multiplies units of a module's input, such as heads before
`o_proj`, with trained coefficients; `prune_units` removes the units of the smallest. U V is dense, so folding gives up
the sparsity of W.

Chen et al., "DSEE: Dually Sparsity-embedded Efficient Tuning of Pre-trained Language Models", 2021, arXiv:2111.00160.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import floor
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from toolkit.adapters.methods._base import AdapterConfig, AdapterLayer, LowRank, Site, WeightChange, register, uniform
from toolkit.adapters.methods._decompose import low_rank_plus_sparse
from toolkit.adapters.methods._masks import pack_bits, smallest, unpack_bits
from toolkit.errors import UnsupportedError

Support = Literal["decomposition", "grebsmo", "magnitude", "random"]

_EXACT = 1024
"""Smaller side of a matrix up to which its decomposition is exact."""


@dataclass
class DseeConfig(AdapterConfig):
    """DSEE.

    Attributes:
        r: rank of U V; 0 leaves it out.
        alpha: U V is multiplied with `alpha / r`.
        num_sparse: entries of S2 in every weight; 0 leaves it out.
        support: their places: the largest entries of what a rank `r` leaves of the weight (`decomposition`); the same
            with the rank found beside the entries and not before them, as the paper does (`grebsmo`); those of the
            weight (`magnitude`); or `random` ones.
        units: ends of module names -> width of a unit of their inputs, such as `{o_proj: 64}` for heads of that size.
        sparsity: share of the base that is pruned; `prune` writes it.
        seed: of the decomposition and of random places.
    """

    r: int = 16
    alpha: float = 16.0
    num_sparse: int = 64
    support: Support = "decomposition"
    units: dict[str, int] = field(default_factory=dict)
    sparsity: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.r, self.num_sparse) < 0 or not (self.r or self.num_sparse or self.units):
            raise ValueError("r and num_sparse are at least 0, and there is one of r, num_sparse and units")
        if self.support not in get_args(Support):
            raise ValueError(f"support is one of {', '.join(get_args(Support))}, not {self.support!r}")
        if not 0 <= self.sparsity < 1:
            raise ValueError(f"sparsity is at least 0 and below 1, not {self.sparsity}")

    def unit_of(self, key: str) -> int | None:
        """Return the width of a unit of a module's input."""
        return next((width for end, width in self.units.items() if f".{key}".endswith(f".{end}")), None)


class DseeLinear(AdapterLayer):
    """A linear, pruned, with a low-rank and a sparse change."""

    TRAINED = ("a", "b", "values", "coefficients")
    STORED = ("index", "mask", "kept_units")

    def start(self, config: DseeConfig, site: Site) -> Mapping[str, Tensor]:
        """Draw A, find the places of S2; B and S2 are zero, coefficients and masks are one."""
        inputs, outputs = self.sizes
        tensors: dict[str, Tensor] = {}
        if config.r:
            tensors |= {"a": uniform((config.r, inputs), fan_in=inputs), "b": torch.zeros(outputs, config.r)}
        if config.num_sparse:
            if config.num_sparse > inputs * outputs:
                raise ValueError(f"num_sparse {config.num_sparse} is more than its {inputs * outputs} weights")
            tensors |= {"values": torch.zeros(config.num_sparse), "index": self._places(config)}
        if width := config.unit_of(site.key):
            if inputs % width:
                raise ValueError(f"units of {width} do not divide its input of {inputs}")
            tensors["coefficients"] = torch.ones(inputs // width)
            tensors["kept_units"] = torch.ones(inputs // width, dtype=torch.uint8)
        if config.sparsity:
            tensors["mask"] = pack_bits(torch.ones(outputs * inputs, dtype=torch.bool))
        return tensors

    def _places(self, config: DseeConfig) -> Tensor:
        """Return the places of S2 as sorted indices into the flattened `[out, in]` weight."""
        inputs, outputs = self.sizes
        if config.inference_mode:  # they will be read
            return torch.arange(config.num_sparse)
        generator = torch.Generator().manual_seed(config.seed)
        if config.support == "random":
            return torch.randperm(inputs * outputs, generator=generator)[: config.num_sparse].sort().values
        rest = self.base_weight
        if config.support == "grebsmo" and config.r:
            return low_rank_plus_sparse(rest, config.r, config.num_sparse, config.seed)[1].cpu()
        if config.support == "decomposition" and config.r:
            rest = rest - _truncated(rest, config.r, config.seed)
        return rest.abs().flatten().topk(config.num_sparse).indices.sort().values.cpu()

    def run_base(self, adapters: list[str], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the linear, with its pruned weight where there is one."""
        linear, weight = self._linear, self.base_weight
        pruned = [one for one in map(self._pruned, adapters) if one is not None]
        if not pruned:
            return super().run_base(adapters, args, kwargs)
        # One is taken as it is, so that what it removes leaves no rounding behind.
        weight = pruned[0] if len(pruned) == 1 else weight + sum(one - weight for one in pruned)
        weight = weight.T if isinstance(linear, Conv1D) else weight
        return functional_call(linear, {"weight": weight.to(linear.weight.dtype)}, args, kwargs)

    def change(self, adapter: str, x: Tensor, y: Tensor) -> Tensor:
        """Return `s U V x + S2 x`."""
        total = y.new_zeros(())
        if self.has(adapter, "a"):
            a, b, scale = self._pair(adapter)
            total = total + functional.linear(functional.linear(x, a), b) * scale
        if self.has(adapter, "values"):
            rows, columns = self._support(adapter)
            parts = x[..., columns] * self.tensor(adapter, "values")
            total = total + torch.zeros_like(y).index_add(-1, rows, parts)
        return total

    def _support(self, adapter: str) -> tuple[Tensor, Tensor]:
        index, inputs = self.tensor(adapter, "index"), self.sizes[0]
        return index // inputs, index % inputs

    def mask(self, adapter: str) -> Tensor | None:
        """Return S1, `[out, in]` bool, or `None` where nothing is pruned."""
        if not self.has(adapter, "mask"):
            return None
        inputs, outputs = self.sizes
        return unpack_bits(self.tensor(adapter, "mask"), inputs * outputs).reshape(outputs, inputs)

    def _pruned(self, adapter: str) -> Tensor | None:
        """Return `W * S1`, its columns multiplied with their coefficients; `None` where that is W."""
        mask, weight = self.mask(adapter), self.base_weight
        if mask is None and not self.has(adapter, "coefficients"):
            return None
        weight = weight if mask is None else weight * mask
        if self.has(adapter, "coefficients"):
            columns = self.tensor(adapter, "coefficients") * self.tensor(adapter, "kept_units")
            weight = weight * columns.repeat_interleave(self.sizes[0] // len(columns))
        return weight

    def low_rank(self, adapter: str) -> LowRank:
        """Return U and V, where they are all there is.

        Raises:
            UnsupportedError: there is a sparse part, or the base is pruned.
        """
        if any(self.has(adapter, name) for name in ("values", "mask", "coefficients")):
            raise UnsupportedError(
                "dsee is more than a low-rank change and cannot be written as LoRA; merge it instead"
            )
        return self._pair(adapter)

    def _pair(self, adapter: str) -> LowRank:
        config = self.configs[adapter]
        return LowRank(self.tensor(adapter, "a"), self.tensor(adapter, "b"), config.alpha / config.r)

    def fold(self, adapter: str) -> WeightChange:
        """Return `W * S1 - W + s U V + S2`."""
        total = torch.zeros_like(self.base_weight)
        if self.has(adapter, "a"):
            a, b, scale = self._pair(adapter)
            total = scale * (b.float() @ a.float())
        if self.has(adapter, "values"):
            total = total.index_put(self._support(adapter), self.tensor(adapter, "values").float(), accumulate=True)
        if (pruned := self._pruned(adapter)) is not None:
            total = total + (pruned.float() - self.base_weight)
        return WeightChange(total)


def _truncated(weight: Tensor, rank: int, seed: int) -> Tensor:
    """Return the best approximation of a rank; of large matrices a randomised one."""
    if min(weight.shape) <= _EXACT:
        u, s, v = torch.linalg.svd(weight, full_matrices=False)
        return (u[:, :rank] * s[:rank]) @ v[:rank]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        u, s, v = torch.svd_lowrank(weight, q=min(rank + 8, *weight.shape), niter=4)
    return (u[:, :rank] * s[:rank]) @ v[:, :rank].T


def prune(model: nn.Module, ratio: float, adapter: str = "default") -> int:
    """Remove the smallest entries of all adapted weights together, changes added in; train on afterwards.

    Args:
        model: with a DSEE adapter.
        ratio: share of the entries to remove, `floor(ratio * N)` of all N.
        adapter: its name.

    Returns:
        How many were removed.

    Raises:
        ValueError: no such adapter, or a share that is not between 0 and 1.
    """
    layers = _layers(model, adapter)
    if not 0 < ratio < 1:
        raise ValueError(f"expected a share between 0 and 1, got {ratio}")
    with torch.no_grad():
        scores = [lambda layer=layer: (layer.base_weight + _added(layer, adapter)).abs() for layer in layers]
        count = floor(ratio * sum(layer.sizes[0] * layer.sizes[1] for layer in layers))
        for layer, removed in zip(layers, smallest(scores, count), strict=True):
            layer.put(adapter, "mask", pack_bits(~removed.flatten()))
    config: Any = model.peft_config
    config[adapter].sparsity = ratio
    return count


def _added(layer: DseeLinear, adapter: str) -> Tensor:
    pruned = layer._pruned(adapter)
    change = layer.fold(adapter).weight
    return change if pruned is None else change - (pruned - layer.base_weight)


def prune_units(model: nn.Module, ratio: float, adapter: str = "default") -> int:
    """Remove the units of the smallest coefficients, a share of those of each width; return how many.

    Raises:
        ValueError: no such adapter, no units, or a share that is not between 0 and 1.
    """
    if not 0 < ratio < 1:
        raise ValueError(f"expected a share between 0 and 1, got {ratio}")
    kinds: dict[int, list[DseeLinear]] = {}
    for layer in _with_units(model, adapter):
        kinds.setdefault(layer.sizes[0] // len(layer.tensor(adapter, "coefficients")), []).append(layer)
    count = 0
    for layers in kinds.values():
        found = [layer.tensor(adapter, "coefficients").detach().abs() for layer in layers]
        removed = floor(ratio * sum(map(len, found)))
        count += removed
        for layer, gone in zip(layers, smallest([lambda one=one: one for one in found], removed), strict=True):
            layer.tensor(adapter, "kept_units")[gone] = 0
    return count


def unit_penalty(model: nn.Module, adapter: str = "default") -> Tensor:
    """Return the sum of the absolute coefficients, to be added to the loss with a small factor."""
    found = [layer.tensor(adapter, "coefficients") for layer in _with_units(model, adapter)]
    return torch.stack([value.abs().sum() for value in found]).sum()


def _layers(model: nn.Module, adapter: str) -> list[DseeLinear]:
    found = [module for module in model.modules() if isinstance(module, DseeLinear) and adapter in module.configs]
    if not found:
        raise ValueError(f"no DSEE adapter {adapter!r} on this model")
    return found


def _with_units(model: nn.Module, adapter: str) -> list[DseeLinear]:
    found = [layer for layer in _layers(model, adapter) if layer.has(adapter, "coefficients")]
    if not found:
        raise ValueError("no module has coefficients; name their units in the adapter's configuration")
    return found


register("dsee", DseeConfig, DseeLinear)
