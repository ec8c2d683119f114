"""Adapters beside whole sublayers, as points of one small design space.

He et al., "Towards a Unified View of Parameter-Efficient Transfer Learning", 2021, arXiv:2110.04366, see one formula,
`h <- h + s * f(input)`, and four choices in it: the *form* of `f` (a bottleneck, or attention to a prefix), the *place*
(attention or feed-forward sublayer), the *insertion* (parallel: `f` of what enters the sublayer; sequential: of what
leaves it), and the *composition* (added, scaled by `s`, or gated: a prefix takes its share of the softmax). The
methods in this folder that import this module differ in these choices alone.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from toolkit.adapters.methods._base import AdapterConfig, AdapterLayer, LowRank, WeightChange, linear_sizes, uniform
from toolkit.adapters.methods._prefix import PrefixedCache, key_shape, prefixed_mask
from toolkit.adapters.methods._sites import Site
from toolkit.errors import UnsupportedError

Place = Literal["attention", "ffn"]
Activation = Literal["relu", "gelu", "silu", "tanh", "identity"]

SUBLAYERS: dict[Place, tuple[str, ...]] = {
    "attention": ("self_attn", "self_attention", "attn", "attention"),
    "ffn": ("mlp", "feed_forward", "ffn", "block_sparse_moe"),
}
"""What decoders of transformers call their sublayers."""

FUNCTIONS: dict[str, Any] = {
    "relu": functional.relu,
    "gelu": functional.gelu,
    "silu": functional.silu,
    "tanh": torch.tanh,
}


@dataclass(frozen=True)
class Design:
    """What an adapter does at one place.

    Attributes:
        form: of the function.
        size: width of the bottleneck, or tokens of the prefix.
        insertion: whether the bottleneck reads what enters the sublayer or what leaves it.
        scale: of what a bottleneck adds; a prefix is gated by the softmax instead.
        activation: of the bottleneck.
        biases: whether its two projections have them.
    """

    form: Literal["bottleneck", "prefix"] = "bottleneck"
    size: int = 64
    insertion: Literal["sequential", "parallel"] = "parallel"
    scale: float = 1.0
    activation: str = "relu"
    biases: bool = True


@dataclass
class UnifiedConfig(AdapterConfig):
    """Fields of all members of the family.

    Attributes:
        target_modules: `sublayers`, those of `places()`; or modules by name, linears among them.
    """

    target_modules: list[str] | str | None = "sublayers"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.places() or set(self.places()) - set(SUBLAYERS):
            raise ValueError(f"sublayers are attention and ffn, not {list(self.places())}")
        for place in self.places():
            _check(self.design(place))

    def places(self) -> tuple[Place, ...]:
        """Return the sublayers that are adapted."""
        return ("ffn",)

    def design(self, place: Place) -> Design:
        """Return what is done at a place."""
        raise NotImplementedError

    def resolve(self, model: nn.Module) -> None:
        """Write the names of the sublayers of a model instead of `sublayers`.

        Raises:
            ValueError: a sublayer is called by none of the known names.
        """
        if self.target_modules != "sublayers":
            return
        ends = {name.rpartition(".")[2] for name, _ in model.named_modules() if re.search(r"\.\d+\.\w+$", name)}
        found = {place: sorted(ends & set(SUBLAYERS[place])) for place in self.places()}
        for place, names in found.items():
            if not names:
                raise ValueError(f"no {place} sublayer of a known name in this model; name its target_modules")
        self.target_modules = sorted(name for names in found.values() for name in names)


def _check(design: Design) -> None:
    if design.size < 1 or not design.scale:
        raise ValueError(f"a {design.form} of size {design.size} and scale {design.scale} changes nothing")
    if design.activation not in get_args(Activation):
        raise ValueError(f"activation is one of {', '.join(get_args(Activation))}, not {design.activation!r}")


class UnifiedLayer(AdapterLayer):
    """A sublayer, or a linear, with a bottleneck or a prefix.

    A bottleneck is `up act(down h + down_bias) + up_bias`, with `down` `[size, in]` and `up` `[out, size]`; `up` starts
    at zero. A prefix is `[size, key heads, head size]` keys and as many values.
    """

    TAKES = "any"
    TRAINED = ("down", "down_bias", "up", "up_bias")

    def start(self, config: UnifiedConfig, site: Site) -> Mapping[str, Tensor]:
        """Make a bottleneck or a prefix, whichever the design wants at this place."""
        design = config.design(place_of(site.key))
        if design.form == "prefix":
            shape = (design.size, *key_shape(self.get_base_layer(), site.config))
            return {"prefix_keys": torch.randn(shape) * 0.02, "prefix_values": torch.randn(shape) * 0.02}
        inputs, outputs = self._widths(site)
        read = inputs if design.insertion == "parallel" else outputs
        tensors = {"down": uniform((design.size, read), fan_in=read), "up": torch.zeros(outputs, design.size)}
        if design.biases:
            tensors |= {"down_bias": torch.zeros(design.size), "up_bias": torch.zeros(outputs)}
        return tensors

    def _widths(self, site: Site) -> tuple[int, int]:
        base = self.get_base_layer()
        if isinstance(base, nn.Linear | Conv1D):
            return linear_sizes(base)
        width = site.config.get_text_config().hidden_size
        return width, width

    def add(self, adapter: str, config: Any, site: Site) -> None:
        """Make a new adapter on this layer; what is kept of its configuration is the design of this place."""
        super().add(adapter, config, site)
        self.configs[adapter] = config.design(place_of(site.key))

    def change(self, adapter: str, x: Tensor, y: Tensor) -> Tensor:
        """Return `scale * bottleneck(x or y)`."""
        design = self.configs[adapter]
        if design.form == "prefix":
            return y.new_zeros(())
        inner = functional.linear(
            x if design.insertion == "parallel" else y, self.tensor(adapter, "down"), self._bias(adapter)
        )
        inner = inner if design.activation == "identity" else FUNCTIONS[design.activation](inner)
        return functional.linear(inner, self.tensor(adapter, "up"), self._bias(adapter, "up_bias")) * design.scale

    def _bias(self, adapter: str, name: str = "down_bias") -> Tensor | None:
        return self.tensor(adapter, name) if self.has(adapter, name) else None

    def run_base(self, adapters: list[str], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the sublayer; an attention with prefixes finds them before all keys and values."""
        adapters = [name for name in adapters if self.configs[name].form == "prefix"]
        if not adapters:
            return super().run_base(adapters, args, kwargs)
        keys, values = (
            torch.cat([self.tensor(name, f"prefix_{kind}") for name in adapters]) for kind in ("keys", "values")
        )
        x = args[0] if args else kwargs["hidden_states"]
        mask = prefixed_mask(kwargs.get("attention_mask"), len(keys), x.shape[1], self.get_base_layer())
        cache = PrefixedCache(kwargs.get("past_key_values"), keys, values)
        return super().run_base(adapters, args, kwargs | {"past_key_values": cache, "attention_mask": mask})

    def folds(self, adapter: str) -> bool:
        """Tell whether this is a linear map beside a linear, with a bias to write its own into where it has one."""
        design, base = self.configs[adapter], self.get_base_layer()
        if not isinstance(base, nn.Linear | Conv1D):
            return False
        return design.activation == "identity" and (base.bias is not None or not design.biases)

    def low_rank(self, adapter: str) -> LowRank:
        """Return `down` and `up`; `down W0` where the insertion is sequential.

        Raises:
            UnsupportedError: it is not linear, or changes biases.
        """
        biased = self.configs[adapter].biases or (
            self.configs[adapter].insertion == "sequential" and self.base_bias is not None
        )
        if not self.folds(adapter) or biased:
            raise UnsupportedError(f"{self.method} adapters cannot be written as LoRA here: not linear, or with biases")
        return self._pair(adapter)

    def fold(self, adapter: str) -> WeightChange:
        """Return the change of the weight, and of the bias where there is one."""
        if not self.folds(adapter):
            raise UnsupportedError(f"{self.method} adapters are no change of weights here")
        a, b, scale = self._pair(adapter)
        if self.base_bias is None:
            return WeightChange(scale * (b @ a))
        inner = torch.zeros(len(a), device=a.device)
        if self.configs[adapter].insertion == "sequential":
            inner = inner + self.tensor(adapter, "down").float() @ self.base_bias
        if self.configs[adapter].biases:
            inner = inner + self.tensor(adapter, "down_bias").float()
        bias = b @ inner
        if self.configs[adapter].biases:
            bias = bias + self.tensor(adapter, "up_bias").float()
        return WeightChange(scale * (b @ a), scale * bias)

    def _pair(self, adapter: str) -> LowRank:
        down, up = self.tensor(adapter, "down").float(), self.tensor(adapter, "up").float()
        a = down @ self.base_weight if self.configs[adapter].insertion == "sequential" else down
        return LowRank(a, up, self.configs[adapter].scale)


def place_of(key: str) -> Place:
    """Return the sublayer that a module is, or belongs to, by its name."""
    return "attention" if any(part in SUBLAYERS["attention"] for part in key.split(".")) else "ffn"
