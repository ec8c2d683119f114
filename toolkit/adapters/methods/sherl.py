"""SHERL: the states of the early layers, made one without their redundancy, go on through the last few layers.

With `x_i` the projected states of early layer i: `r_i = sum_j relu(cos(x_i, x_j))`, `w_i` the share of
`relu(fc(x_i * x_last)) / r_i` among the layers, and what enters the first late layer is
`up(relu(sum_i w_i x_i)) + tanh(g / 0.1) h`, with `h` what would have entered. Early layers run without a graph;
gradients pass through the late ones, which stay frozen.

The paper starts at `g = 0`, where nothing of `h` passes. Here `g` starts at 1 and `up` at zero, which is the base;
`gate: 0` is the paper's.

Diao et al., "SHERL: Synthesizing High Accuracy and Efficient Memory for Resource-Limited Transfer Learning", 2024,
arXiv:2407.07523.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from toolkit.adapters.methods._base import Site, register
from toolkit.adapters.methods._decoder import DecoderConfig, SideLayer, chosen_layers
from toolkit.adapters.taps import tapped

_SHARPNESS = 0.1
"""What `g` is divided by, as in the authors' code."""


@dataclass
class SherlConfig(DecoderConfig):
    """SHERL.

    Attributes:
        late: layers at the end that gradients pass through.
        reduction: how many times narrower the network is; divides the hidden size.
        layers: numbers of the early layers whose states are taken, -1 the last of them; all by default.
        gate: `g` at the start.
    """

    late: int = 1
    reduction: int = 4
    layers: list[int] | None = None
    gate: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.late, self.reduction) < 1:
            raise ValueError("late and reduction are at least 1")


class SherlNetwork(nn.Module):
    """Makes one state of several.

    Args:
        sources: positions of the states among those tapped.
        wide: hidden size.
        narrow: of the network.
        gate: at the start.
    """

    def __init__(self, sources: list[int], wide: int, narrow: int, gate: float) -> None:
        super().__init__()
        self.sources = sources
        self.downs = nn.ModuleList(nn.Linear(wide, narrow) for _ in sources)
        self.score = nn.Linear(narrow, 1)
        self.up = nn.Linear(narrow, wide)
        self.gate = nn.Parameter(torch.full((1,), gate))
        if gate:
            nn.init.zeros_(self.up.weight)
            nn.init.zeros_(self.up.bias)

    def forward(self, states: list[Tensor]) -> Tensor:
        """Return what enters the first late layer, `[B, T, H]`; the last state is what would have."""
        dtype = self.up.weight.dtype
        features = torch.stack(
            [down(states[s].to(dtype)) for down, s in zip(self.downs, self.sources, strict=True)], dim=-2
        )
        early = self.up(functional.relu(self.consolidated(features)))
        return early + torch.tanh(self.gate / _SHARPNESS) * states[-1].to(dtype)

    def consolidated(self, features: Tensor) -> Tensor:
        """Return the weighted sum of `[..., layers, h]` over the layers."""
        scores = functional.relu(self.score(features * features[..., -1:, :]))[..., 0] / redundancy(features)
        total = scores.sum(-1, keepdim=True)
        weights = scores / total.where(total > 0, 1)
        return (weights[..., None] * features).sum(-2)


def redundancy(features: Tensor) -> Tensor:
    """Return the sum of the positive cosines of each layer's state with all, its own included, `[..., layers]`."""
    unit = functional.normalize(features, dim=-1)
    # That with itself is one, also where rounding or a state of zeros says otherwise.
    cosines = functional.relu(unit @ unit.transpose(-1, -2))
    own = torch.eye(features.shape[-2], dtype=features.dtype, device=features.device)
    return (cosines * (1 - own) + own).sum(-1)


class SherlLayer(SideLayer):
    """A decoder whose last layers get what SHERL makes of the states before."""

    def make(self, config: SherlConfig, site: Site) -> SherlNetwork:
        """Return a new network."""
        early, wide = len(self.layers) - config.late, site.config.get_text_config().hidden_size
        if early < 0 or wide % config.reduction:
            raise ValueError(
                f"late {config.late} of {len(self.layers)} layers, or reduction {config.reduction} of {wide}"
            )
        # The state at position i is what enters layer i; what leaves early layer i is the one after.
        sources = [0] if not early else [n + 1 for n in chosen_layers(config.layers, early)]
        return SherlNetwork(sources, wide, wide // config.reduction, config.gate)

    def run(self, adapters: list[str], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the early layers without a graph and the late ones with one."""
        starts = {len(self.layers) - self.configs[name].late for name in adapters}
        if len(starts) > 1:
            raise ValueError("adapters with different numbers of late layers cannot be active together")
        (start,) = starts
        graph = torch.is_grad_enabled()

        def enter(module: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> Any:
            torch.set_grad_enabled(graph)  # until the block below ends
            state = given[0] if given else named["hidden_states"]
            states = [*seen.states, state] if not seen.states else seen.states
            total = state
            for index, name in enumerate(adapters):
                made = self.networks[name](states).to(state.dtype)
                total = made if not index else total + (made - state)
            if given:
                return (total, *given[1:]), named
            return given, named | {"hidden_states": total}

        handle = self.layers[start].register_forward_pre_hook(enter, with_kwargs=True)
        try:
            with tapped(self.layers[:start]) as seen, torch.no_grad():
                return self.base_layer(*args, **kwargs)
        finally:
            handle.remove()


register("sherl", SherlConfig, SherlLayer)
