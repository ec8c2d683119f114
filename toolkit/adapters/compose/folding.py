"""A composition as a change of weights, where it is one."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor

from toolkit.adapters.compose.mix import Mixture, Once, Rows
from toolkit.adapters.methods._base import AdapterLayer, WeightChange
from toolkit.errors import UnsupportedError

Pair = tuple[Tensor, Tensor]
"""`[r, in]` and `[out, r]`, whose product is the change."""


def pairs(built: Any, floor: Once) -> list[Pair]:
    """Return the factors of all sources, each mixture's weights in its second one.

    Args:
        built: the composed module.
        floor: the module itself.

    Raises:
        UnsupportedError: a source is no LoRA, or they are mixed by what they are given.
    """
    return _walk(built, floor, _pair, lambda pair, weight: (pair[0], weight[..., None] * pair[1]))


def changes(built: Any, floor: Once) -> Tensor:
    """Return the change of the weight, `[out, in]` float32.

    Raises:
        UnsupportedError: it is none.
    """
    found = _walk(built, floor, _change, lambda change, weight: weight[..., None] * change)
    return torch.stack(found).sum(0)


def _walk(node: Any, floor: Any, read: Any, scale: Any) -> list[Any]:
    if node is floor:
        return []
    if isinstance(node, Once):
        return _walk(node.base_layer, floor, read, scale)
    lower = _walk(node.base_layer, floor, read, scale)
    if not isinstance(node, Mixture):
        if lower and not isinstance(node, LoraLayer):
            raise UnsupportedError("an adapter that is stacked on others cannot be folded, unless it is a LoRA")
        return [*lower, read(node)]
    if not hasattr(node.rule, "weights") or isinstance(node.rule, Rows):
        raise UnsupportedError(
            "what mixes by the input or by the row is no change of weights and cannot be written as LoRA"
        )
    for branch, weight in zip(node.branches, node.rule.weights(), strict=True):
        inner = _walk(branch, node.once, read, scale)
        lower += [scale(one, weight.detach().float().to(_device(one))) for one in inner]
    return lower


def _device(value: Any) -> torch.device:
    return value.device if isinstance(value, Tensor) else value[0].device


def _name(layer: Any) -> str:
    (name,) = layer.active_adapters
    return name


def _pair(layer: Any) -> Pair:
    name = _name(layer)
    if isinstance(layer, AdapterLayer):
        a, b, scale = layer.low_rank(name)
        return a.detach().float(), scale * b.detach().float()
    if not isinstance(layer, LoraLayer) or name not in layer.lora_A or name in layer.lora_variant:
        raise UnsupportedError(f"a source of type {type(layer).__name__} is no LoRA, and cannot be written as LoRA")
    factors: Any = (layer.lora_A[name], layer.lora_B[name])
    a, b = (factor.weight.detach().float() for factor in factors)
    return a, layer.scaling[name] * b


def _change(layer: Any) -> Tensor:
    """Return the change that a source makes to a weight."""
    if isinstance(layer, AdapterLayer):
        name = _name(layer)
        change: WeightChange | None = layer.fold(name) if layer.folds(name) else None
        if change is None or change.bias is not None:
            raise UnsupportedError(f"{layer.method} adapters are more than a change of weights here")
        return change.weight.detach().float()
    if isinstance(layer, LoraLayer) and _name(layer) not in layer.lora_variant:
        a, b = _pair(layer)
        return b @ a
    raise UnsupportedError(f"a source of type {type(layer).__name__} cannot be folded into a composition's weights")
