"""Bottleneck adapters that several tasks share, whole or in part: plain, Compacter, and Hyperformer.

After each sublayer `y + up act(down y + b) + c`, where a row's task decides which matrices it gets:

- `adapter`: one pair of projections per task; with `share` all tasks have the down-, the up-projection or both in
  common (half-shared and single adapters).
- `compacter`: each projection is `sum_i A_i (x) B_i`, a sum of `blocks` Kronecker products; the small A_i are common to
  all tasks and to all layers of a kind, and `B_i = u_i v_i` has rank `phm_rank`. Shared over tasks as above.
- `hyperformer`: a network makes both projections from an embedding of the task and one of the layer.

Sung et al., "VL-Adapter: Parameter-Efficient Transfer Learning for Vision-and-Language Tasks", 2021, arXiv:2112.06825;
Mahabadi et al., "Compacter: Efficient Low-Rank Hypercomplex Adapter Layers", 2021, arXiv:2106.04647, and
"Parameter-efficient Multi-task Fine-tuning for Transformers via Shared Hypernetworks", 2021, arXiv:2106.04489.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from peft import PeftModel
from torch import Tensor, nn

from toolkit.adapters.methods._base import AdapterLayer, Site, register, uniform
from toolkit.adapters.methods._unified import FUNCTIONS, Activation, Design, Place, UnifiedConfig

Kind = Literal["adapter", "compacter", "hyperformer"]
Share = Literal["none", "down", "up", "both"]


@dataclass
class VlAdapterConfig(UnifiedConfig):
    """Adapters over several tasks.

    Attributes:
        n_tasks: how many; the task of a row is a number from 0.
        kind: `adapter`, `compacter` or `hyperformer`.
        share: what all tasks have in common: `none`, `down`, `up` or `both`; not for `hyperformer`.
        sublayers: that are adapted: `attention`, `ffn`.
        size: width of the bottleneck.
        activation: in it.
        blocks: `compacter`: Kronecker products of a projection; divides hidden size and bottleneck.
        phm_rank: `compacter`: rank of their larger factors; 0 is full.
        task_size: `hyperformer`: entries of an embedding of a task, and of a layer.
        inner_size: `hyperformer`: entries of what the projections are made from.
    """

    n_tasks: int = 1
    kind: Kind = "adapter"
    share: Share = "none"
    sublayers: list[Place] = field(default_factory=lambda: ["attention", "ffn"])
    size: int = 64
    activation: Activation = "gelu"
    blocks: int = 4
    phm_rank: int = 1
    task_size: int = 16
    inner_size: int = 16

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind) or self.share not in get_args(Share):
            raise ValueError(
                f"kind is one of {get_args(Kind)} and share of {get_args(Share)}, not {self.kind}, {self.share}"
            )
        if min(self.n_tasks, self.blocks, self.task_size, self.inner_size) < 1 or self.phm_rank < 0:
            raise ValueError("n_tasks, blocks, task_size and inner_size are at least 1, and phm_rank at least 0")
        super().__post_init__()

    def places(self) -> tuple[Place, ...]:
        """Return the sublayers that are adapted."""
        return tuple(self.sublayers)

    def design(self, place: Place) -> Design:
        """Return a sequential bottleneck."""
        return Design("bottleneck", self.size, "sequential", 1.0, self.activation)


class VlAdapterLayer(AdapterLayer):
    """A sublayer with a bottleneck of each task after it."""

    TAKES = "any"
    TRAINED = (
        *("down", "down_bias", "up", "up_bias"),
        *("down_rule", "down_left", "down_right", "up_rule", "up_left", "up_right"),
        *("task_embedding", "layer_embedding", "inner"),
        *("make_down", "make_down_bias", "make_up", "make_up_bias"),
    )

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__(base_layer)
        # In plain dicts: what layers share is a parameter of one of them alone.
        self.holders: dict[str, VlAdapterLayer] = {}
        self.places: dict[str, int] = {}
        self.other_param_names = (*self.other_param_names, "holders", "places")
        self.tasks: Tensor | None = None

    def add(self, adapter: str, config: Any, site: Site) -> None:
        """Make a new adapter, and remember who holds what it shares."""
        assert isinstance(site.first, VlAdapterLayer)
        super().add(adapter, config, site)
        self.places[adapter] = site.index
        if site.first is not self:
            self.holders[adapter] = site.first

    def start(self, config: VlAdapterConfig, site: Site) -> Mapping[str, Tensor]:
        """Make what a place has of its own, and at the first of a kind what all share; all up-projections are zero."""
        wide = site.config.get_text_config().hidden_size
        if config.kind == "hyperformer":
            return _hypernetwork(config, site.count, wide) if site.index == 0 else {}
        tasks = {side: 1 if config.share in (side, "both") else config.n_tasks for side in ("down", "up")}
        tensors = {
            "down_bias": torch.zeros(tasks["down"], config.size),
            "up_bias": torch.zeros(tasks["up"], wide),
        }
        if config.kind == "adapter":
            tensors["down"] = uniform((tasks["down"], config.size, wide), fan_in=wide)
            tensors["up"] = torch.zeros(tasks["up"], wide, config.size)
            return tensors
        for side, outputs, inputs in (("down", config.size, wide), ("up", wide, config.size)):
            tensors |= _factors(config, side, tasks[side], outputs, inputs, first=site.index == 0)
        return tensors

    def change(self, adapter: str, x: Tensor, y: Tensor) -> Tensor:
        """Return the bottleneck of each row's task."""
        config: VlAdapterConfig = self.configs[adapter]
        down, down_bias, up, up_bias = self.projections(adapter)
        rows = self._rows(config, y)
        down, down_bias, up, up_bias = (_of(value, rows, len(y)) for value in (down, down_bias, up, up_bias))
        inner = y @ down.transpose(1, 2) + down_bias[:, None]
        inner = inner if config.activation == "identity" else FUNCTIONS[config.activation](inner)
        return inner @ up.transpose(1, 2) + up_bias[:, None]

    def _rows(self, config: VlAdapterConfig, y: Tensor) -> Tensor:
        """Return the task of every row of a batch `[B, ...]`."""
        if config.n_tasks == 1:
            return torch.zeros(len(y), dtype=torch.long, device=y.device)
        if self.tasks is None:
            raise ValueError(
                "name the task of every row: task_ids of a model that takes_task_ids, or `with tasks(model, ids)`"
            )
        times, rest = divmod(len(y), len(self.tasks))
        if rest or int(self.tasks.max()) >= config.n_tasks or int(self.tasks.min()) < 0:
            raise ValueError(f"tasks {self.tasks.tolist()} for {len(y)} rows; they are 0 to {config.n_tasks - 1}")
        return self.tasks.to(y.device).repeat_interleave(times)  # generation repeats rows for beams

    def projections(self, adapter: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return down `[n, size, H]`, its bias `[n, size]`, up `[n, H, size]` and its bias `[n, H]` of all tasks.

        `n` is the number of tasks, or one where they share it.
        """
        config: VlAdapterConfig = self.configs[adapter]
        if config.kind == "hyperformer":
            return self._generated(adapter)
        down_bias, up_bias = self.tensor(adapter, "down_bias"), self.tensor(adapter, "up_bias")
        if config.kind == "adapter":
            return self.tensor(adapter, "down"), down_bias, self.tensor(adapter, "up"), up_bias
        return self._kronecker(adapter, "down"), down_bias, self._kronecker(adapter, "up"), up_bias

    def _shared(self, adapter: str, name: str) -> Tensor:
        return self.holders.get(adapter, self).tensor(adapter, name)

    def _kronecker(self, adapter: str, side: str) -> Tensor:
        """Return `sum_i A_i (x) B_i` of each task."""
        right = self.tensor(adapter, f"{side}_right")
        if self.has(adapter, f"{side}_left"):
            right = self.tensor(adapter, f"{side}_left") @ right
        rule = self._shared(adapter, f"{side}_rule").to(right.device)
        tasks, _, outputs, inputs = right.shape
        product = torch.einsum("iab,tioc->taobc", rule, right)
        return product.reshape(tasks, rule.shape[1] * outputs, rule.shape[2] * inputs)

    def _generated(self, adapter: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        config: VlAdapterConfig = self.configs[adapter]
        tasks, layers = (self._shared(adapter, f"{what}_embedding") for what in ("task", "layer"))
        both = torch.cat([tasks, layers[self.places[adapter]].expand(len(tasks), -1)], dim=-1)
        source = torch.relu(both @ self._shared(adapter, "inner").T)
        down, down_bias, up, up_bias = (
            source @ self._shared(adapter, f"make_{name}").T for name in ("down", "down_bias", "up", "up_bias")
        )
        return down.unflatten(-1, (config.size, -1)), down_bias, up.unflatten(-1, (-1, config.size)), up_bias

    def folds(self, adapter: str) -> bool:
        """Tell that it is no change of weights."""
        return False

    def _dtype(self, adapter: str, default: torch.dtype) -> torch.dtype:
        return super()._dtype(
            adapter, self.holders[adapter]._dtype(adapter, default) if adapter in self.holders else default
        )


def _of(value: Tensor, rows: Tensor, count: int) -> Tensor:
    """Return each row's own of a tensor of all tasks; without a copy where all tasks share it."""
    return value.expand(count, *value.shape[1:]) if len(value) == 1 else value[rows]


def _factors(
    config: VlAdapterConfig, side: str, tasks: int, outputs: int, inputs: int, *, first: bool
) -> dict[str, Tensor]:
    n, rank = config.blocks, config.phm_rank
    if outputs % n or inputs % n:
        raise ValueError(f"{n} blocks do not divide a projection of {inputs} to {outputs}")
    tensors = {f"{side}_rule": torch.randn(n, n, n) / n} if first else {}
    right = (tasks, n, rank or outputs // n, inputs // n)
    if rank:
        left = torch.zeros if side == "up" else torch.randn
        tensors[f"{side}_left"] = left(tasks, n, outputs // n, rank)
        tensors[f"{side}_right"] = uniform(right, fan_in=inputs)
    else:
        tensors[f"{side}_right"] = torch.zeros(right) if side == "up" else uniform(right, fan_in=inputs)
    return tensors


def _hypernetwork(config: VlAdapterConfig, places: int, wide: int) -> dict[str, Tensor]:
    size, inner = config.size, config.inner_size
    return {
        "task_embedding": torch.randn(config.n_tasks, config.task_size),
        "layer_embedding": torch.randn(places, config.task_size),
        "inner": uniform((inner, 2 * config.task_size), fan_in=2 * config.task_size),
        "make_down": uniform((size * wide, inner), fan_in=inner * wide),
        "make_down_bias": torch.zeros(size, inner),
        "make_up": torch.zeros(wide * size, inner),
        "make_up_bias": torch.zeros(wide, inner),
    }


@contextmanager
def tasks(model: nn.Module, ids: Sequence[int] | Tensor) -> Iterator[None]:
    """Give the rows of every batch inside the block these tasks.

    Args:
        model: with such an adapter.
        ids: one per row.
    """
    layers = [module for module in model.modules() if isinstance(module, VlAdapterLayer)]
    before = [layer.tasks for layer in layers]
    for layer in layers:
        layer.tasks = torch.as_tensor(ids)
    try:
        yield
    finally:
        for layer, old in zip(layers, before, strict=True):
            layer.tasks = old


def takes_task_ids(model: PeftModel) -> None:
    """Let a model take `task_ids` with its rows, as POLY does; PEFT itself throws them away for other types."""
    layers = [module for module in model.modules() if isinstance(module, VlAdapterLayer)]

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        ids = kwargs.get("task_ids")
        for layer in layers:
            layer.tasks = None if ids is None else torch.as_tensor(ids)
        return args, {key: value for key, value in kwargs.items() if key != "task_ids"}

    if layers:
        model.register_forward_pre_hook(before, with_kwargs=True)


register("vl_adapter", VlAdapterConfig, VlAdapterLayer)
