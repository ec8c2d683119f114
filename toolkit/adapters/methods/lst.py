"""Ladder side-tuning: a narrow copy of the decoder beside it, which reads its states and is all that is trained.

Side layer k sees `mu_k down_k(h_k) + (1 - mu_k) s_{k-1}` with `mu_k = sigmoid(alpha_k / T)`, where `h_k` is what leaves
the decoder's layer and `s_k` what leaves the side layer; `s_0` is the projected embedding. Side layers are of the
decoder's own kind, `reduction` times narrower, and start as a part of its weights: the first heads, hidden and
feed-forward units. Nothing of the decoder is kept for the backward pass.

In the paper the side network alone predicts. Here its projected output is added to the decoder's, and starts at zero,
so that training starts at the base; `residual: false` is the paper's form.

Sung et al., "LST: Ladder Side-Tuning for Parameter and Memory Efficient Transfer Learning", 2022, arXiv:2206.06522.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from toolkit.adapters.methods._base import Site, register
from toolkit.adapters.methods._decoder import (
    DecoderConfig,
    SideLayer,
    chosen_layers,
    last_states,
    with_last_states,
)
from toolkit.adapters.taps import Taps, extend, tapped


@dataclass
class LstConfig(DecoderConfig):
    """Ladder side-tuning.

    Attributes:
        reduction: how many times narrower the side network is; divides the hidden size.
        layers: numbers of the decoder's layers that have a side layer; all by default.
        temperature: `T` of the gates.
        residual: add the side network's output to the decoder's, instead of predicting from it alone.
        pruned: start from the decoder's weights; otherwise at random.
    """

    reduction: int = 8
    layers: list[int] | None = None
    temperature: float = 0.1
    residual: bool = True
    pruned: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.reduction < 1 or self.temperature <= 0:
            raise ValueError("reduction is at least 1, and temperature above 0")


class LstNetwork(nn.Module):
    """The side network.

    Args:
        config: of the method.
        decoder: that it stands beside.
        layers: of the decoder.
        first: number of the first side layer in a cache.
    """

    def __init__(self, config: LstConfig, decoder: Any, layers: nn.ModuleList, first: int) -> None:
        super().__init__()
        text = decoder.config.get_text_config()
        wide = text.hidden_size
        if wide % config.reduction:
            raise ValueError(f"reduction {config.reduction} does not divide the hidden size {wide}")
        self.sources = chosen_layers(config.layers, len(layers))
        self.first, self.temperature = first, config.temperature
        small = narrowed(text, config.reduction, self.sources, first)
        kind: Any = type(layers[0])
        self.blocks = nn.ModuleList(kind(small, first + k) for k in range(len(self.sources))).float()
        narrow = wide // config.reduction
        self.downs = nn.ModuleList(nn.Linear(wide, narrow, bias=False) for _ in range(len(self.sources) + 1))
        self.alphas = nn.Parameter(torch.zeros(len(self.sources)))
        self.norm = nn.RMSNorm(narrow, eps=1e-6)
        self.up = nn.Linear(narrow, wide, bias=False)
        if config.residual:
            nn.init.zeros_(self.up.weight)
        if config.pruned:
            for block, source in zip(self.blocks, self.sources, strict=True):
                prune_into(block, layers[source], narrow, wide)

    def gates(self) -> Tensor:
        """Return `mu` of every side layer."""
        return torch.sigmoid(self.alphas / self.temperature)

    def forward(self, taps: Taps) -> Tensor:
        """Return the projected output, `[B, T, H]`."""
        dtype = self.up.weight.dtype
        state = self.downs[0](taps.states[0].to(dtype))
        for k, (source, gate) in enumerate(zip(self.sources, self.gates(), strict=True)):
            call = taps.calls[source]
            if call.cache is not None:
                extend(call.cache, self.first + k, source)
            state = gate * self.downs[k + 1](taps.states[source + 1].to(dtype)) + (1 - gate) * state
            output = self.blocks[k](state, **call.kwargs)
            state = output[0] if isinstance(output, tuple) else output
        return self.up(self.norm(state))


def narrowed(config: Any, reduction: int, sources: list[int], first: int) -> Any:
    """Return the configuration of side layers: as many times narrower, with heads of the same size.

    Args:
        config: of the decoder.
        reduction: how many times.
        sources: layers of the decoder that the side layers are like.
        first: number of the first side layer.
    """
    small = copy.deepcopy(config)
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None)
    small.hidden_size = config.hidden_size // reduction
    if getattr(config, "intermediate_size", None):
        small.intermediate_size = max(config.intermediate_size // reduction, 1)
    if size is None and small.hidden_size % max(heads // reduction, 1) == 0:
        small.num_attention_heads = max(heads // reduction, 1)
    elif size is not None:
        small.head_dim, small.num_attention_heads = size, max(heads // reduction, 1)
    if getattr(config, "num_key_value_heads", None):
        wanted = max(config.num_key_value_heads // reduction, 1)
        small.num_key_value_heads = wanted if small.num_attention_heads % wanted == 0 else small.num_attention_heads
    if getattr(config, "layer_types", None):
        filled = list(config.layer_types) + [config.layer_types[0]] * (first - len(config.layer_types))
        small.layer_types = filled + [config.layer_types[source] for source in sources]
        small.num_hidden_layers = len(small.layer_types)
    return small


@torch.no_grad()
def prune_into(block: nn.Module, layer: nn.Module, narrow: int, wide: int) -> None:
    """Start a side layer as a part of a decoder's layer: the first units of every axis that is narrower.

    An axis that is a multiple of the hidden size, such as that of queries, keys and values in one matrix, is cut in
    each of its parts. So hidden units, heads and feed-forward units are the same in all matrices.
    """
    wides = dict(layer.named_parameters())
    for name, value in block.named_parameters():
        source = wides.get(name.replace(".base_layer.", "."))
        if source is None or not source.is_floating_point() or source.ndim != value.ndim:
            continue
        kept = source.detach().float().cpu()
        for axis, (size, whole) in enumerate(zip(value.shape, source.shape, strict=True)):
            parts = whole // wide if whole % wide == 0 and size == whole // wide * narrow else 1
            kept = torch.cat([part.narrow(axis, 0, size // parts) for part in kept.chunk(parts, axis)], axis)
        value.copy_(kept)


class LstLayer(SideLayer):
    """A decoder with a ladder beside it."""

    def make(self, config: LstConfig, site: Site) -> LstNetwork:
        """Return a new ladder."""
        taken = sum(len(network.sources) for network in self.networks.values())  # pyright: ignore[reportArgumentType,reportAttributeAccessIssue]
        return LstNetwork(config, self.get_base_layer(), self.layers, len(self.layers) + taken)

    def run(self, adapters: list[str], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the decoder and the ladders; where none is a residual, the decoder's own output is left out."""
        if any(self.configs[name].residual for name in adapters):
            return super().run(adapters, args, kwargs)
        with tapped(self.layers) as seen, torch.no_grad():
            output = self.base_layer(*args, **kwargs)
        total = sum(self.networks[name](seen) for name in adapters)
        return with_last_states(output, total.to(last_states(output).dtype))  # pyright: ignore[reportAttributeAccessIssue]


register("lst", LstConfig, LstLayer)
