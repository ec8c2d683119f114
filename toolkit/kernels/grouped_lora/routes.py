"""Which adapters work on which rows of a batch, and the work lists that the kernels take from it.

Shape suffixes: T rows, J adapters of a row, E assignments (one row and one of its adapters).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from toolkit.kernels.grouped_lora.api import DORA_ALONE

if TYPE_CHECKING:
    from toolkit.kernels.grouped_lora.pages import PagedPairs
    from toolkit.kernels.grouped_lora.stacks import Gathered


MOST_ROWS = 8
"""Rows of an adapter that are few: more are worth a product of their own, unless all adapters have as many."""

MOST_PADDING = 1.25
"""Rows of a product for all adapters, each as often as the one with the most has any, as a share of those there are."""


@dataclass(frozen=True, eq=False)
class Routes:
    """The adapters of every row.

    Attributes:
        slots: `[T, J]` int, slots of `PagedPairs`, each at most once in a row; -1 is no adapter.
        weights: `[T, J]` float32, what each change is multiplied with.
        mixture: `[P, T, J]` in place of `weights`, one for each linear, on the device; every row then has the same
            slots.
        gathered: rows in the orders of stacks of adapters, by the adapters; see `stacks`.
    """

    slots: np.ndarray
    weights: np.ndarray
    mixture: torch.Tensor | None = None
    gathered: dict[tuple[int, ...], Gathered] = field(default_factory=dict, init=False, repr=False)
    _plans: dict[tuple[object, ...], Plan] = field(default_factory=dict, init=False, repr=False)

    @classmethod
    def of(cls, slots: Sequence[int] | Sequence[Sequence[int]], weights: object = 1.0) -> Routes:
        """Make routes of one slot per row, or of several; one weight may stand for all.

        Raises:
            ValueError: a row names an adapter twice.
        """
        found = np.asarray(slots, np.int64)
        found = found[:, None] if found.ndim == 1 else found
        ordered = np.sort(found, axis=1)
        if ((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).any():
            raise ValueError("a row names an adapter twice; add its weights up")
        given = np.asarray(weights, np.float32)
        given = given[:, None] if given.ndim == 1 else given
        return cls(found, np.broadcast_to(given, found.shape))

    @classmethod
    def to_all(cls, slots: Sequence[int], count: int) -> Routes:
        """Make routes of the same adapters for every one of `count` rows, for a mixture."""
        return cls.of([list(slots)] * count)

    def mixed(self, mixture: torch.Tensor) -> Routes:
        """Return the same adapters with weights `[P, T, J]` on the device; the work lists stay the same."""
        found = copy.copy(self)
        object.__setattr__(found, "mixture", mixture)
        return found

    def present(self, linear: int = 0) -> Iterator[tuple[int, int, float]]:
        """Yield row, slot and weight at a linear of every assignment."""
        weights = self.weights if self.mixture is None else self.mixture[linear].float().cpu().numpy()
        for row, choice in zip(*np.nonzero(self.slots >= 0), strict=True):
            yield int(row), int(self.slots[row, choice]), float(weights[row, choice])

    @cached_property
    def largest_group(self) -> int:
        """Rows of the adapter that has the most."""
        used = self.slots[self.slots >= 0]
        return int(np.bincount(used).max()) if used.size else 0

    @cached_property
    def by_slot(self) -> dict[int, tuple[list[int], list[float]]]:
        """Rows, in order, and weights of every adapter."""
        found: dict[int, tuple[list[int], list[float]]] = {}
        for slots, weights in zip(self.slots.T.tolist(), self.weights.T.tolist(), strict=True):
            for row, (slot, weight) in enumerate(zip(slots, weights, strict=True)):
                if slot >= 0:
                    rows, own = found.setdefault(slot, ([], []))
                    rows.append(row)
                    own.append(weight)
        return found

    @cached_property
    def slots_together(self) -> tuple[int, ...]:
        """Slots of the adapters that one product may serve: all if they have about equally many rows, else those with
        at most `MOST_ROWS`."""
        counts = {slot: len(rows) for slot, (rows, _) in self.by_slot.items()}
        if counts and len(counts) * max(counts.values()) <= MOST_PADDING * sum(counts.values()):
            return tuple(counts)
        return tuple(slot for slot, count in counts.items() if count <= MOST_ROWS)

    @cached_property
    def segments(self) -> list[tuple[int, int, int, float]]:
        """Start, stop, slot and weight of consecutive rows that have the same one of each."""
        found = []
        for slots, weights in zip(self.slots.T, self.weights.T, strict=True):
            edges = np.flatnonzero((slots[1:] != slots[:-1]) | (weights[1:] != weights[:-1])) + 1
            bounds = [0, *edges.tolist(), len(slots)] if len(slots) else []
            found += [
                (start, stop, int(slots[start]), float(weights[start]))
                for start, stop in pairwise(bounds)
                if slots[start] >= 0
            ]
        return found

    def check_dora(self, pairs: PagedPairs) -> None:
        """Raise `ValueError` where a DoRA is weighted, or shares its row with another adapter."""
        if pairs.doras.isdisjoint(self.by_slot):
            return
        dora = (self.slots >= 0) & pairs.is_dora[self.slots]
        shared = (self.slots >= 0).sum(axis=1, keepdims=True) > 1
        if (dora & (shared | (self.weights != 1))).any():
            raise ValueError(DORA_ALONE)

    def plan(self, ranks: np.ndarray, blocks: Blocks, device: torch.device) -> Plan:
        """Return the work lists; those of the same ranks and blocks are made once.

        Args:
            ranks: `[S]`, rank rows of each slot; those without are left out.
            blocks: what one program works on.
            device: where the lists go.
        """
        used = np.unique(self.slots[self.slots >= 0])
        key = (ranks[used].tobytes(), blocks, device)
        if key not in self._plans:
            self._plans[key] = make_plan(self, ranks, blocks, device)
        return self._plans[key]


@dataclass(frozen=True)
class Blocks:
    """What one program works on.

    Attributes:
        row_ranks: rank rows, where a program has one row.
        tile_rows: rows of a tile.
        tile_ranks: rank rows of a tile.
        all_rows: no inner products in tiles; looking up an embedding is no product.
    """

    row_ranks: int
    tile_rows: int
    tile_ranks: int
    all_rows: bool = False


@dataclass(frozen=True)
class Plan:
    """Work lists on the device, int32 but for the weights.

    Assignments are sorted by slot, within a slot those of rows with several adapters last. Each has a row of inner
    products as long as its adapter's rank; all of them lie in one flat buffer without padding.

    Attributes:
        rows: `[E]`, row of each assignment.
        choices: `[E]`, its place among all `[T, J]` slots.
        weights: `[E]` float32.
        places: `[E]`, where each assignment's inner products begin.
        single: `[E]`, 1 where the inner products are made a row at a time: the adapter has no other row.
        size: inner products in all.
        shrink_rows: `[*, 3]`: assignment, slot, first rank row.
        shrink_tiles: `[*, 4]`: first assignment, assignments, slot, first rank row.
        expand_rows: `[*, 2]`: assignment, slot.
        tile_bounds: `[tiles + 1]`, first entry of each tile of outputs.
        tile_rows: `[tiles, tile rows]`, row of each line of a tile, -1 for none.
        entries: `[*, 1 + tile rows]`: slot, and the assignment of each line, -1 for none.
        groups: `[*, 3]`: first assignment, assignments and slot of each adapter.
        slots: on the host, the slots that work.
    """

    rows: torch.Tensor
    choices: torch.Tensor
    weights: torch.Tensor
    places: torch.Tensor
    single: torch.Tensor
    size: int
    shrink_rows: torch.Tensor
    shrink_tiles: torch.Tensor
    expand_rows: torch.Tensor
    tile_bounds: torch.Tensor
    tile_rows: torch.Tensor
    entries: torch.Tensor
    groups: torch.Tensor
    slots: np.ndarray


@dataclass(frozen=True)
class _Assignments:
    """Sorted assignments, on the host."""

    rows: np.ndarray
    choices: np.ndarray
    slots: np.ndarray
    weights: np.ndarray
    composed: np.ndarray

    def groups(self) -> list[tuple[int, int, int]]:
        """Return first assignment, number and slot of every adapter."""
        starts = np.flatnonzero(np.diff(self.slots, prepend=-1))
        counts = np.diff(starts, append=len(self.slots))
        return list(zip(starts.tolist(), counts.tolist(), self.slots[starts].tolist(), strict=True))


def make_plan(routes: Routes, ranks: np.ndarray, blocks: Blocks, device: torch.device) -> Plan:
    """Make the work lists; see `Routes.plan`."""
    found = list_work(routes, ranks, blocks)
    widths = plan_widths(blocks)
    arrays = {name: np.asarray(rows, np.int32).reshape(-1, widths.get(name, 1)) for name, rows in found.lists.items()}
    weights = torch.from_numpy(found.weights).to(device)
    return Plan(**_moved(arrays, device), weights=weights, size=found.size, slots=found.slots)


def plan_widths(blocks: Blocks) -> dict[str, int]:
    """Return the numbers of a row of the lists that have several."""
    widths = {"shrink_rows": 3, "shrink_tiles": 4, "expand_rows": 2, "groups": 3}
    return widths | {"tile_rows": blocks.tile_rows, "entries": 1 + blocks.tile_rows}


@dataclass(frozen=True)
class WorkLists:
    """What `Plan` holds, on the host."""

    lists: dict[str, Any]
    weights: np.ndarray
    size: int
    slots: np.ndarray


def list_work(routes: Routes, ranks: np.ndarray, blocks: Blocks) -> WorkLists:
    """Make the work lists on the host."""
    work = _sorted(routes, ranks)
    groups = work.groups()
    lengths = ranks[work.slots]
    single = [blocks.all_rows or count == 1 for _, count, _ in groups for _ in range(count)]
    expand_rows, tiles = _expand(work, groups, blocks)
    bounds = np.cumsum([0, *(len(entries) for _, entries in tiles)])
    lists = {
        "rows": work.rows,
        "choices": work.choices,
        "places": np.cumsum(lengths) - lengths,
        "single": single,
        "shrink_rows": [
            (e, slot, r)
            for first, count, slot in groups
            if blocks.all_rows or count == 1
            for e in range(first, first + count)
            for r in range(0, int(ranks[slot]), blocks.row_ranks)
        ],
        "shrink_tiles": [
            (e, min(blocks.tile_rows, first + count - e), slot, r)
            for first, count, slot in groups
            if count > 1 and not blocks.all_rows
            for e in range(first, first + count, blocks.tile_rows)
            for r in range(0, int(ranks[slot]), blocks.tile_ranks)
        ],
        "expand_rows": expand_rows,
        "tile_bounds": bounds,
        "tile_rows": [rows for rows, _ in tiles],
        "entries": [entry for _, entries in tiles for entry in entries],
        "groups": groups,
    }
    return WorkLists(lists, work.weights.astype(np.float32), int(lengths.sum()), np.unique(work.slots))


def _moved(arrays: dict[str, np.ndarray], device: torch.device) -> dict[str, torch.Tensor]:
    """Copy arrays to the device in one transfer."""
    flat = torch.from_numpy(np.concatenate([array.ravel() for array in arrays.values()])).to(device)
    parts = flat.split([array.size for array in arrays.values()])
    return {name: part.view(array.shape) for (name, array), part in zip(arrays.items(), parts, strict=True)}


def _sorted(routes: Routes, ranks: np.ndarray) -> _Assignments:
    """Return the assignments whose adapter has rank rows here, by slot, rows with several adapters last."""
    present = (routes.slots >= 0) & (ranks[routes.slots] > 0)
    rows, choices = np.nonzero(present)
    slots, weights = routes.slots[rows, choices], routes.weights[rows, choices]
    composed = present.sum(axis=1)[rows] > 1
    order = np.lexsort((rows, composed, slots))
    places = rows * routes.slots.shape[1] + choices
    return _Assignments(rows[order], places[order], slots[order], weights[order], composed[order])


Tile = tuple[list[int], list[list[int]]]
"""Rows of a tile of outputs, and per adapter its slot and the assignment of each line."""


def _expand(
    work: _Assignments, groups: Sequence[tuple[int, int, int]], blocks: Blocks
) -> tuple[list[tuple[int, int]], list[Tile]]:
    """Divide the outputs among programs: each row belongs to one, which adds up all of the row's adapters."""
    rows: list[tuple[int, int]] = []
    tiles: list[Tile] = []
    for first, count, slot in groups:
        plain = count - int(work.composed[first : first + count].sum())
        if plain == 1:
            rows.append((first, slot))
            continue
        for start in range(first, first + plain, blocks.tile_rows):
            own = list(range(start, min(start + blocks.tile_rows, first + plain)))
            tiles.append((_padded(work.rows[own].tolist(), blocks), [[slot, *_padded(own, blocks)]]))
    return rows, tiles + _composed_tiles(work, blocks)


def _composed_tiles(work: _Assignments, blocks: Blocks) -> list[Tile]:
    """Put rows with several adapters into tiles, rows with the same adapters together."""
    owners: dict[int, dict[int, int]] = {}
    for e in np.flatnonzero(work.composed).tolist():
        owners.setdefault(int(work.rows[e]), {})[int(work.slots[e])] = e
    ordered = sorted(owners, key=lambda row: (*owners[row], row))
    tiles = []
    for start in range(0, len(ordered), blocks.tile_rows):
        rows = ordered[start : start + blocks.tile_rows]
        slots = sorted({slot for row in rows for slot in owners[row]})
        entries = [[slot, *_padded([owners[row].get(slot, -1) for row in rows], blocks)] for slot in slots]
        tiles.append((_padded(rows, blocks), entries))
    return tiles


def _padded(values: list[int], blocks: Blocks) -> list[int]:
    return values + [-1] * (blocks.tile_rows - len(values))
