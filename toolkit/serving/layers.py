"""Linears that know many adapters: installed over a model's own, and taken away again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast

import torch
from torch import nn

from toolkit.kernels.grouped_lora import Pair, Segment, grouped_lora
from toolkit.kernels.impl import Impl


@dataclass
class BatchAdapters:
    """Which adapter works on which rows of the running step; empty outside of steps.

    Attributes:
        rows: segments of the flat batch.
        head_rows: segments of the rows that reach the output head.
        impl: form of the operation, `None` for the device's own.
    """

    rows: Sequence[Segment] = ()
    head_rows: Sequence[Segment] = ()
    impl: Impl | None = None

    @contextmanager
    def active(self, rows: Sequence[Segment], head_rows: Sequence[Segment]) -> Iterator[None]:
        """Hold segments for the forward pass inside the block."""
        self.rows, self.head_rows = rows, head_rows
        try:
            yield
        finally:
            self.rows, self.head_rows = (), ()


class MultiAdapterLinear(nn.Module):
    """A linear whose rows each get the change of their own adapter.

    Args:
        base: the model's own linear, called as it is.
        batch: the running step's segments, shared by all layers.
        is_head: it is the output head, which sees only the rows that are sampled.
    """

    def __init__(self, base: nn.Module, batch: BatchAdapters, is_head: bool) -> None:
        super().__init__()
        self.base, self.batch, self.is_head = base, batch, is_head
        self.pairs: dict[str, Pair] = {}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return `base(x)` plus each row's own change; `x` is `[1, T, K]` in a step."""
        y = self.base(x)
        segments = self.batch.head_rows if self.is_head else self.batch.rows
        if segments and self.pairs:
            flat_y, flat_x = y.view(-1, y.shape[-1]), x.reshape(-1, x.shape[-1])
            grouped_lora(flat_y, flat_x, segments, self.pairs, self.bias, impl=self.batch.impl)
        return y

    @property
    def weight(self) -> torch.Tensor:
        """The base's weight, for those who look at it."""
        return cast(torch.Tensor, self.base.weight)

    @property
    def bias(self) -> torch.Tensor | None:
        """The base's bias."""
        return cast("torch.Tensor | None", getattr(self.base, "bias", None))


def wrap(model: nn.Module, name: str, batch: BatchAdapters, head: nn.Module | None) -> MultiAdapterLinear:
    """Return the wrapper of a module of the model, putting it there when it is not."""
    parent_name, _, child = name.rpartition(".")
    parent = model.get_submodule(parent_name)
    module = model.get_submodule(name)
    if not isinstance(module, MultiAdapterLinear):
        module = MultiAdapterLinear(module, batch, is_head=module is head)
        setattr(parent, child, module)
    return module


def unwrap_all(model: nn.Module) -> None:
    """Put back every module that was wrapped."""
    for name, module in list(model.named_modules()):
        if isinstance(module, MultiAdapterLinear):
            parent_name, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent_name), child, module.base)
