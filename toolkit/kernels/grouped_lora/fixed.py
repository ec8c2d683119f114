"""Routes whose work lists keep their place and their size, so that a captured graph serves whichever adapters come.

The lists have room for every row's adapters at the ranks that adapters may have, whatever share of them there are; what
is not used is work that its programs see at once that they do not have.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch

from toolkit.kernels.fixed import FixedLists, Room
from toolkit.kernels.grouped_lora.routes import Blocks, Plan, Routes, list_work, plan_widths

NO_RANK = 1 << 30
"""First rank row of work that is none: beyond those of any adapter."""

LEAST_RANK = 16
"""Rank rows that there is always room for."""


@dataclass
class _Kept:
    """One set of lists, and all the tables of ranks that it is right for."""

    lists: FixedLists
    weights: torch.Tensor
    plan: Plan
    most_ranks: int
    ranks: list[np.ndarray]

    def fits(self, slots: np.ndarray) -> bool:
        """Whether the adapters in some slots are alike for all that share these lists, and have room."""
        first, *others = (ranks[slots] for ranks in self.ranks)
        return bool(first.size == 0 or first.max() <= self.most_ranks) and all(
            np.array_equal(first, other) for other in others
        )


@dataclass(frozen=True, eq=False)
class FixedRoutes(Routes):
    """Routes that change in place, rows and adapters of a row staying as many as they are.

    A captured graph of `paged_lora` that was given them serves whatever routes `change` has taken up since.
    """

    _now: list[Routes] = field(default_factory=list, init=False, repr=False)
    _kept: dict[tuple[bytes, Blocks], _Kept] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        """Begin with the routes themselves."""
        self._now.append(Routes(self.slots, self.weights))

    @property
    def largest_group(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        """As many rows as an adapter could have, so that kernels are configured alike at every step."""
        return len(self.slots)

    def plan(self, ranks: np.ndarray, blocks: Blocks, device: torch.device) -> Plan:
        """Return lists that follow the routes; see `Routes.plan`.

        Args:
            ranks: a table that changes in place as adapters come and go.
            blocks: what one program works on.
            device: where the lists go.
        """
        used = _used(self._now[0])
        key = (ranks[used].tobytes(), blocks)
        if key not in self._kept:
            self._kept[key] = self._keep(ranks, blocks, device)
        kept = self._kept[key]
        if not any(np.shares_memory(ranks, known) for known in kept.ranks):
            kept.ranks.append(ranks)
        return kept.plan

    def change(self, routes: Routes) -> bool:
        """Take up other routes if the lists have room for them.

        Args:
            routes: of as many rows, with as many adapters each.

        Returns:
            Whether they do; if not, nothing has changed.
        """
        if routes.slots.shape != self.slots.shape:
            return False
        used = _used(routes)
        if not all(kept.fits(used) for kept in self._kept.values()):
            return False
        self._now[0] = routes
        for kept in self._kept.values():
            kept.lists.refresh()
        return True

    def _keep(self, ranks: np.ndarray, blocks: Blocks, device: torch.device) -> _Kept:
        rows, choices = self.slots.shape
        most = max(LEAST_RANK, 1 << (int(ranks[_used(self._now[0])].max(initial=1)) - 1).bit_length())
        rooms = _rooms(rows, choices, most, blocks)
        weights = torch.zeros(rows * choices, dtype=torch.float32, device=device)

        def make() -> dict[str, np.ndarray]:
            found = list_work(self._now[0], ranks, blocks)
            full = np.zeros(rows * choices, np.float32)
            full[: len(found.weights)] = found.weights
            weights.copy_(torch.from_numpy(full))
            return found.lists

        lists = FixedLists(rooms, make, device)
        size = rows * choices * most
        plan = Plan(**lists.tensors, weights=weights, size=size, slots=_used(self._now[0]))
        return _Kept(lists, weights, plan, most, [ranks])


def _used(routes: Routes) -> np.ndarray:
    return np.unique(routes.slots[routes.slots >= 0])


def _rooms(rows: int, choices: int, ranks: int, blocks: Blocks) -> dict[str, Room]:
    """Return the most that each list can have; see `list_work`."""
    assigned, widths = rows * choices, plan_widths(blocks)
    paired = assigned // 2  # an adapter has a tile for every two of its rows at most
    composed = rows if choices > 1 else 0
    row_blocks, tile_blocks = -(-ranks // blocks.row_ranks), -(-ranks // blocks.tile_ranks)
    none = (-1,) * blocks.tile_rows
    return {
        **{name: Room(assigned, fill=(0,)) for name in ("rows", "choices", "places", "single")},
        "shrink_rows": Room(assigned * row_blocks, widths["shrink_rows"], (0, 0, NO_RANK)),
        "shrink_tiles": Room(paired * tile_blocks, widths["shrink_tiles"], (0, 0, 0, NO_RANK)),
        "expand_rows": Room(rows, widths["expand_rows"], (-1, 0)),
        "tile_bounds": Room(paired + composed + 1),
        "tile_rows": Room(paired + composed, blocks.tile_rows, none),
        "entries": Room(paired + composed * choices, 1 + blocks.tile_rows, (0, *none)),
        "groups": Room(assigned, widths["groups"], (0, 0, 0)),
    }
