"""Models whose every row mixes its experts by hand, with singular vectors of whole changes in float64."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from tests import tiny
from toolkit.checkpoints.adapters import open_adapter
from toolkit.serving.mix import parse_model

Route = Callable[[str, Tensor, dict[int, Tensor]], dict[int, float]]
"""Of a linear's name, one row of its input and the changes `[N, K]` of its experts: the weight of each that works."""


def save_experts(base: Path, root: Path) -> dict[str, Path]:
    """Write LoRAs of several ranks, scales and modules."""
    kinds: dict[str, dict[str, Any]] = {
        "one": {},
        "two": {"r": 6, "lora_alpha": 3},
        "three": {"r": 2, "target_modules": ["q_proj", "v_proj", "down_proj"]},
        "four": {"r": 4, "use_rslora": True, "target_modules": ["q_proj", "k_proj", "gate_proj", "o_proj", "lm_head"]},
    }
    return {n: tiny.save_lora(base, root / n, seed=60 + i, **fields) for i, (n, fields) in enumerate(kinds.items())}


def changes_of(folder: Path) -> dict[str, Tensor]:
    """Return what a LoRA folder adds to every linear, `[N, K]` float64."""
    adapter, tensors = open_adapter(folder), load_file(folder / "adapter_model.safetensors")
    found = {}
    for name, part in adapter.parts.items():
        found[name] = adapter.scale(name) * tensors[part.b].double() @ tensors[part.a].double()
    return found


def arrow_by_hand(top_k: int, temperature: float) -> Route:
    """Return Arrow as the paper has it."""
    known: dict[tuple[str, int], Tensor] = {}

    def route(site: str, x: Tensor, changes: dict[int, Tensor]) -> dict[int, float]:
        scores = {}
        for expert, change in changes.items():
            if (site, expert) not in known:
                known[site, expert] = torch.linalg.svd(change, full_matrices=False).Vh[0]
            scores[expert] = abs(float(x.double() @ known[site, expert]))
        best = sorted(scores, key=lambda e: -scores[e])[:top_k]
        shares = torch.softmax(torch.tensor([scores[e] for e in best], dtype=torch.float64) / temperature, 0)
        return dict(zip(best, shares.tolist(), strict=True))

    return route


def with_routes(model: PreTrainedModel, experts: list[dict[str, Tensor]], route: Route) -> PreTrainedModel:
    """Make every row of every linear mix its experts, one row at a time."""
    for name in {site for changes in experts for site in changes}:
        own = {i: changes[name] for i, changes in enumerate(experts) if name in changes}

        def hook(module: Any, args: Any, y: Tensor, name: str = name, own: dict[int, Tensor] = own) -> Tensor:
            x, out = args[0].flatten(0, -2), y.flatten(0, -2).double()
            for row in range(len(x)):
                for expert, weight in route(name, x[row], own).items():
                    out[row] += weight * (own[expert] @ x[row].double())
            return out.to(y.dtype).view_as(y)

        model.get_submodule(name).register_forward_hook(hook)
    return model


class RoutedOracle:
    """The base, adapters and compositions folded into weights, and token routers by hand.

    Args:
        base: folder.
        experts: LoRA folders by name.
        routers: specs of Arrow, or routes with the names of their experts.
    """

    def __init__(self, base: Path, experts: Mapping[str, Path], routers: Mapping[str, Any]) -> None:
        self.base, self.experts, self.routers = base, experts, routers
        self.model = cache(self._model)

    def _model(self, name: str) -> PreTrainedModel:
        model = tiny.load_merged(self.base, None)
        if name in self.routers:
            spec = self.routers[name]
            names, route = (
                spec if isinstance(spec, tuple) else (spec.adapters, arrow_by_hand(spec.top_k, spec.temperature or 1.0))
            )
            return with_routes(model, [changes_of(self.experts[n]) for n in names], route)
        with torch.no_grad():
            for part, weight in parse_model(name):
                for site, change in changes_of(self.experts[part]).items():
                    value: Any = model.get_submodule(site).weight
                    value.copy_(value.double() + weight * change)
        return model

    def greedy(self, name: str, prompt: list[int], count: int) -> list[int]:
        return tiny.greedy(self.model(name), prompt, count)
