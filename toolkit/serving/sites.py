"""Where adapters work in a model: modules that are wrapped so that every row gets the change of its own adapters.

A *site* is a module that maps each token by itself: a linear, a norm, an embedding. Linears that read the same input
(q, k and v, say) are a group, whose changes are computed together when the first of them is called.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from toolkit.kernels.grouped_lora import PagedPairs, Routes, Segment, paged_lora, paged_lora_form
from toolkit.kernels.impl import Impl
from toolkit.serving.changes import Change

if TYPE_CHECKING:
    from toolkit.serving.adapters.target import Target
    from toolkit.serving.token_routing import RoutedRows


@dataclass(frozen=True)
class Rows:
    """Which adapters work on which rows of one batch.

    Attributes:
        routes: slots and weights of low-rank adapters; `None` where there are none.
        slots: those that work.
        segments: rows of adapters that change modules in other ways.
        routed: rows whose adapters a token router chooses; the routes have none there.
    """

    routes: Routes | None = None
    slots: frozenset[int] = frozenset()
    segments: Sequence[Segment] = ()
    routed: Sequence[RoutedRows] = ()

    @property
    def is_plain(self) -> bool:
        """Whether the base alone works."""
        return self.routes is None and not self.segments and not self.routed


PLAIN = Rows()


@dataclass
class BatchAdapters:
    """Which adapters work on which rows of the running step; nothing outside of steps.

    Attributes:
        rows: of the flat batch.
        head_rows: of the rows that reach the output head.
        everywhere: one row's worth, for all rows of ordinary forward passes.
        impl: form of the operation, `None` for the device's own.
    """

    rows: Rows = PLAIN
    head_rows: Rows = PLAIN
    everywhere: Rows = PLAIN
    impl: Impl | None = None
    _repeated: dict[int, Rows] = field(default_factory=dict, repr=False)

    @contextmanager
    def active(self, rows: Rows, head_rows: Rows) -> Iterator[None]:
        """Hold the rows of a step for the forward pass inside the block."""
        self.rows, self.head_rows = rows, head_rows
        try:
            yield
        finally:
            self.rows, self.head_rows = PLAIN, PLAIN

    @contextmanager
    def on_every_row(self, row: Rows) -> Iterator[None]:
        """Let the adapters of one row work on every row of forward passes inside the block."""
        self.everywhere = row
        try:
            yield
        finally:
            self.everywhere = PLAIN
            self._repeated.clear()

    def of(self, x: torch.Tensor, *, is_head: bool) -> Rows:
        """Return the rows of a module that sees an input: features `[..., K]`, or ids."""
        if self.everywhere is PLAIN:
            return self.head_rows if is_head else self.rows
        count = x.numel() // (x.shape[-1] if x.is_floating_point() else 1)
        if count not in self._repeated:
            self._repeated[count] = _repeat(self.everywhere, count)
        return self._repeated[count]


def _repeat(row: Rows, count: int) -> Rows:
    routes = row.routes and Routes(row.routes.slots.repeat(count, axis=0), row.routes.weights.repeat(count, axis=0))
    segments = [Segment(0, sys.maxsize, s.adapter, s.weight) for s in row.segments]
    routed = [replace(r, start=0, stop=sys.maxsize) for r in row.routed]
    return Rows(routes or None, row.slots, segments, routed)


def overlap(one: Segment, other: Segment) -> bool:
    """Tell whether two segments have a row in common."""
    return one.start < other.stop and other.start < one.stop


class Site(nn.Module):
    """A module whose rows each get the change of their own adapters.

    Args:
        base: the model's own, called as it is.
        batch: the running step's rows, shared by all sites.
        is_head: it is the output head, which sees only the rows that are sampled.
        dim: dimension of its input that rows run along; the ones before it have one element.
    """

    def __init__(self, base: nn.Module, batch: BatchAdapters, *, is_head: bool, dim: int) -> None:
        super().__init__()
        self.base, self.batch, self.is_head, self.dim = base, batch, is_head, dim
        self.changes: dict[str, Change] = {}
        self.group: LinearGroup | None = None
        self.index = 0

    def __getattr__(self, name: str) -> Any:
        """Return what the base has, for those who look at its weight."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base"), name)

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Module:
        """Copy the model's own module: a copy of the model is without adapters."""
        return copy.deepcopy(self.base, memo)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return `base(x)` plus each row's own change; rows run along `dim` in a step."""
        rows = self.batch.of(x, is_head=self.is_head)
        if rows.is_plain:
            return self.base(x)
        if self.group is not None and not self.group.slots.isdisjoint(rows.slots):
            return self.group.outputs(self.index, x, rows)
        return self.changed(x, rows)

    def changed(self, x: torch.Tensor, rows: Rows) -> torch.Tensor:
        """Return the base's outputs with all changes but the low-rank ones."""
        y = self.base(x)
        own = [segment for segment in rows.segments if segment.adapter in self.changes] if self.changes else ()
        if not own:
            return y
        out = y.clone()
        for segment in own:
            at = (*[slice(None)] * self.dim, slice(segment.start, segment.stop))
            changed = self.changes[segment.adapter].outputs(self.base, x[at], y[at])
            # What one adapter alone gives is not rounded twice.
            alone = segment.weight == 1 and not any(overlap(segment, other) for other in own if other is not segment)
            out[at] = changed if alone else out[at] + segment.weight * (changed - y[at])
        return out


def place_site(target: Target, name: str, batch: BatchAdapters) -> Site:
    """Return the site of a module, putting it into the model when it is not there."""
    parent_name, _, child = name.rpartition(".")
    parent = target.model.get_submodule(parent_name)
    module = getattr(parent, child)
    if not isinstance(module, Site):
        module = Site(module, batch, is_head=name == target.head, dim=target.observed.rows_dim[name])
        setattr(parent, child, module)
    return module


def remove_sites(model: nn.Module) -> None:
    """Put back every module that was wrapped."""
    for name, module in list(model.named_modules()):
        if isinstance(module, Site):
            parent_name, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent_name), child, module.base)


class LinearGroup:
    """Sites of linears that read the same input, and the low-rank adapters there.

    Args:
        sites: of the linears, in the order in which the model calls them.
        names: of the linears.
        pairs: factors of all adapters.

    Attributes:
        slots: of adapters that have factors here.
    """

    def __init__(self, sites: Sequence[Site], names: Sequence[str], pairs: PagedPairs) -> None:
        self.sites, self.names, self.pairs = list(sites), list(names), pairs
        self.slots: set[int] = set()
        self._biases = [cast("torch.Tensor | None", getattr(site.base, "bias", None)) for site in sites]
        # Without checks in every step: the widths are the model's, and what a request may mix was seen to before.
        self._add = paged_lora_form(pairs.pool.device, sites[0].batch.impl)
        self._input: torch.Tensor | None = None
        self._outputs: list[torch.Tensor | None] = []
        for index, site in enumerate(sites):
            site.group, site.index = self, index

    def outputs(self, index: int, x: torch.Tensor, rows: Rows) -> torch.Tensor:
        """Return what a site gives for an input; the others' results are kept until they are asked for it too."""
        if self._input is not x or self._outputs[index] is None:
            self._input, self._outputs = x, list(self._compute(x, rows))
        y = self._outputs[index]
        self._outputs[index] = None
        if not any(output is not None for output in self._outputs):
            self._input = None
        return cast(torch.Tensor, y)

    def _compute(self, x: torch.Tensor, rows: Rows) -> Sequence[torch.Tensor]:
        ys = [site.changed(x, rows) for site in self.sites]
        flat = [y.view(-1, y.shape[-1]) for y in ys]
        inputs = x.reshape(-1, x.shape[-1]) if x.is_floating_point() else x.reshape(-1)
        if inputs.stride(-1) != 1:
            inputs = inputs.contiguous()
        if rows.routes is not None:
            self._add(flat, inputs, rows.routes, self.pairs, self._biases)
        for routed in rows.routed:
            if not self.slots.isdisjoint(routed.slots):
                own, x_TK = slice(routed.start, routed.stop), inputs[routed.start : routed.stop]
                routes = routed.routes(self.names, x_TK)
                impl = self.sites[0].batch.impl
                paged_lora([y[own] for y in flat], x_TK, routes, self.pairs, self._biases, impl=impl)
        return ys
