"""Where in a model the layers of an adapter sit, and which of them are of one kind."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from peft.tuners.tuners_utils import (
    BaseTunerLayer,
    _find_minimal_target_modules,
    _maybe_include_all_linear_layers,
    check_target_module_exists,
)
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

if TYPE_CHECKING:
    from toolkit.adapters.methods._base import Tuner
    from toolkit.adapters.methods._layer import AdapterLayer


@dataclass(frozen=True)
class Site:
    """One adapted module in its model.

    Attributes:
        key: its name, such as `model.layers.3.self_attn.q_proj`.
        layer: what is around it now.
        index: how many of its kind come before it.
        count: modules of its kind: the same last name, type and sizes.
        first: the layer around the first of them.
        config: of the model, or `None`.
    """

    key: str
    layer: AdapterLayer
    index: int
    count: int
    first: AdapterLayer
    config: Any


class Sites:
    """All modules that a configuration names in a model, in the model's order."""

    def __init__(self, tuner: Tuner, config: Any, model: nn.Module) -> None:
        self.model_config = getattr(model, "config", None)
        self.placed: defaultdict[tuple[Any, ...], list[AdapterLayer]] = defaultdict(list)
        if config.target_modules == "all-linear":
            _name_linears(config, model)
        self.counts = Counter(
            _kind(key, module)
            for key, module in model.named_modules()
            if key and tuner._check_target_module_exists(config, key)
        )

    def take(self, key: str, layer: AdapterLayer) -> Site:
        """Return the site of the next layer."""
        kind = _kind(key, layer)
        before = self.placed[kind]
        before.append(layer)
        return Site(key, layer, len(before) - 1, self.counts[kind], before[0], self.model_config)


def target_weights(config: Any, model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the weights of the linears that a configuration names, `[out, in]` float32, without adapters."""
    if config.target_modules == "all-linear":
        _name_linears(config, model)
    for key, module in model.named_modules():
        base: Any = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
        if isinstance(base, nn.Linear | Conv1D) and check_target_module_exists(config, key):
            transposed = isinstance(base, Conv1D) and module is base
            weight = getattr(module, "base_weight", base.weight.detach().float())  # another adapter may be merged
            yield key, weight.T if transposed else weight


def _name_linears(config: Any, model: nn.Module) -> None:
    """Write the shortest ends of names that say the same as `all-linear`.

    PEFT does so itself, later and for large models alone; whole names would hide `layers_to_transform` from it.
    """
    _maybe_include_all_linear_layers(config, model)
    head = getattr(model, "get_output_embeddings", lambda: None)()
    for name, module in model.named_modules():  # adapted ones, which PEFT knows by the names of its own classes
        if isinstance(module, BaseTunerLayer) and module is not head and _is_linear(module):
            config.target_modules |= {name}
    ends = tuple(f".{name}" for name in config.target_modules)
    others = [n for n, _ in model.named_modules() if n not in config.target_modules and not n.endswith(ends)]
    config.target_modules = _find_minimal_target_modules(config.target_modules, others)


def _is_linear(layer: BaseTunerLayer) -> bool:
    return isinstance(layer.get_base_layer(), nn.Linear | Conv1D)


def _kind(key: str, module: Any) -> tuple[Any, ...]:
    base: Any = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    shapes = tuple(tuple(value.shape) for value in base.parameters())
    return key.rpartition(".")[2], type(base).__name__, shapes
