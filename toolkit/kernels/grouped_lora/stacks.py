"""Copies of the factors of the adapters that answer just now, stacked so that one batched product serves them all.

A product of a few rows with the factors of one adapter takes less time than to ask for it, so many adapters with few
rows each, or with about equally many, go into one product. Pages may lie anywhere and a batched product cannot, hence
the copies: one per adapter that joins, none while the same ones go on. Adapters of equal ranks at all linears share a
stack, so no rank is padded.

Where every row mixes the same adapters, a stack is one adapter of all ranks together: its inner products, each weighted
for its row, multiply all second factors at once.

Shape suffixes: P linears, T rows, n adapters of a stack, m rows of each, R inner products of a row, r of them at one
linear.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    import numpy as np

    from toolkit.kernels.grouped_lora.pages import PagedPairs
    from toolkit.kernels.grouped_lora.routes import Routes

FEWEST = 3
"""Adapters that are worth a stack."""

MOST_TOGETHER = 48
"""Adapters of a mixture for which it pays to multiply every row with all of them, though it uses a few."""


@dataclass(frozen=True)
class Gathered:
    """Rows of a batch in the order of a stack.

    Attributes:
        rows_nm: flat, `[n * m]`, row of the batch; adapters with fewer rows repeat one. `None` where these are the rows
            of the batch as they are.
        weights_nm1: of their changes, 0 for what is repeated; `None` where all are 1.
    """

    rows_nm: torch.Tensor | None
    weights_nm1: torch.Tensor | None


class Stack:
    """Factors of adapters of the same ranks.

    Args:
        pairs: where they are copied from.
        ranks: at each linear.

    Attributes:
        slots: that it holds, in order.
    """

    def __init__(self, pairs: PagedPairs, ranks: Sequence[int]) -> None:
        self.pairs, self.ranks = pairs, tuple(ranks)
        self.slots: list[int] = []
        self._versions: list[int] = []
        self._a = pairs.pool.new_empty(0, sum(ranks), pairs.widths[0])
        self._bs = [pairs.pool.new_empty(0, r, width) for r, width in zip(ranks, pairs.widths[1:], strict=True)]
        self._use()

    def hold(self, slots: Sequence[int]) -> list[int]:
        """See to it that the stack holds exactly these adapters, copying what is new; return them in its order."""
        wanted = {slot: self.pairs.versions[slot] for slot in slots}
        held = dict(zip(self.slots, self._versions, strict=True))
        new = [slot for slot, version in wanted.items() if held.get(slot) != version]
        if new or len(held) != len(wanted):
            free = [i for i, slot in enumerate(self.slots) if wanted.get(slot) != held[slot]]
            self._fill(new, free)
            self._use()
        return self.slots

    def _use(self) -> None:
        """Note the parts of the tensors that are in use, for `add` is called often and slicing takes its time."""
        n, at = len(self.slots), 0
        self._a_nKR = self._a[:n].transpose(1, 2)
        self._linears: list[tuple[int, int, int, torch.Tensor]] = []
        for linear, (rank, b_nrN) in enumerate(zip(self.ranks, self._bs, strict=True)):
            if rank:
                self._linears.append((linear, at, rank, b_nrN[:n]))
            at += rank

    def _fill(self, new: list[int], free: list[int]) -> None:
        """Copy adapters into free places, then further ones; close the gaps that are left with the last ones."""
        self._grow(len(self.slots) - len(free) + len(new))
        for slot in new:
            place = free.pop(0) if free else len(self.slots)
            if place == len(self.slots):
                self.slots.append(slot)
                self._versions.append(0)
            self.slots[place], self._versions[place] = slot, self.pairs.versions[slot]
            self._copy(slot, place)
        for place in reversed(free):
            last = len(self.slots) - 1
            for tensor in (self._a, *self._bs):
                tensor[place] = tensor[last]
            self.slots[place], self._versions[place] = self.slots[last], self._versions[last]
            self.slots.pop()
            self._versions.pop()

    def _grow(self, count: int) -> None:
        if count <= len(self._a):
            return
        size = max(count, len(self._a) + len(self._a) // 2)
        self._a = _longer(self._a, size)
        self._bs = [_longer(b, size) for b in self._bs]

    def _copy(self, slot: int, place: int) -> None:
        at = 0
        for linear, rank in enumerate(self.ranks):
            pair = self.pairs.read(slot, linear)
            if pair is not None:
                # Scaled here once, and not its inner products in every step.
                torch.mul(pair.a_rK, pair.scale, out=self._a[place, at : at + rank])
                self._bs[linear][place] = pair.b_Nr.T
                at += rank

    def add(self, ys: Sequence[torch.Tensor], x_TK: torch.Tensor, gathered: Gathered) -> None:
        """Add the changes of all its adapters to their rows, in place."""
        n, rows = len(self.slots), gathered.rows_nm
        x_nmK = (x_TK if rows is None else x_TK.index_select(0, rows)).view(n, -1, x_TK.shape[1])
        inner_nmR = torch.bmm(x_nmK, self._a_nKR)
        if gathered.weights_nm1 is not None:
            inner_nmR.mul_(gathered.weights_nm1)
        for linear, at, rank, b_nrN in self._linears:
            own_nmr = inner_nmR.narrow(2, at, rank) if rank < inner_nmR.shape[2] else inner_nmR
            if rows is None:
                ys[linear].view(n, x_nmK.shape[1], -1).baddbmm_(own_nmr, b_nrN)
            else:
                ys[linear].index_add_(0, rows, torch.bmm(own_nmr, b_nrN).view(len(rows), -1))

    def mix(self, ys: Sequence[torch.Tensor], x_TK: torch.Tensor, weights_PTn: torch.Tensor) -> None:
        """Add to every row the changes of all adapters, each times its weight at the linear, in place."""
        n = len(self.slots)
        if n > MOST_TOGETHER:
            self._mix_each(ys, x_TK, weights_PTn)
            return
        inner_TnR = torch.mm(x_TK, self._a[:n].reshape(-1, x_TK.shape[1]).T).view(len(x_TK), n, -1)
        for linear, at, rank, b_nrN in self._linears:
            own_Tnr = inner_TnR[:, :, at : at + rank] * weights_PTn[linear].to(x_TK.dtype)[:, :, None]
            ys[linear].addmm_(own_Tnr.view(-1, n * rank), b_nrN.reshape(n * rank, -1))

    def _mix_each(self, ys: Sequence[torch.Tensor], x_TK: torch.Tensor, weights_PTn: torch.Tensor) -> None:
        """Do what `mix` does one adapter after another, each for the rows that use it."""
        for linear, at, rank, b_nrN in self._linears:
            used_nT = (weights_PTn[linear] != 0).T
            for place in used_nT.any(1).nonzero()[:, 0].tolist():
                rows = used_nT[place].nonzero()[:, 0]
                inner = torch.mm(x_TK[rows], self._a[place, at : at + rank].T)
                weights = weights_PTn[linear, rows, place, None].to(x_TK.dtype)
                y = ys[linear]
                y[rows] = torch.addmm(y[rows], inner * weights, b_nrN[place])


class Stacks:
    """The stacks of some linears, by the ranks of the adapters that they hold."""

    def __init__(self, pairs: PagedPairs) -> None:
        self.pairs = pairs
        self._stacks: dict[tuple[int, ...], Stack] = {}
        self._chosen: list[tuple[Stack, tuple[int, ...]]] = []
        self._chosen_for: object = None
        self._mixtures: dict[tuple[int, ...], tuple[int, dict[tuple[int, ...], Stack]]] = {}

    def of_mixture(self, slots_TJ: np.ndarray) -> list[tuple[Stack, list[int]]]:
        """Return the stacks of what every row mixes, and which of the columns J are their adapters, in their order."""
        slots = tuple(slots_TJ[0].tolist())
        edition, stacks = self._mixtures.get(slots, (-1, {}))
        if edition != self.pairs.edition:
            self._mixtures = {other: m for other, m in self._mixtures.items() if self._are_placed(other)}
            groups: dict[tuple[int, ...], list[int]] = {}
            for slot in filter(self.pairs.plain.__contains__, slots):
                groups.setdefault(self.pairs.ranks_of(slot), []).append(slot)
            stacks = {ranks: stacks.get(ranks) or Stack(self.pairs, ranks) for ranks in groups}
            for ranks, own in groups.items():
                stacks[ranks].hold(own)
            self._mixtures[slots] = self.pairs.edition, stacks
        return [(stack, [slots.index(slot) for slot in stack.slots]) for stack in stacks.values()]

    def _are_placed(self, slots: tuple[int, ...]) -> bool:
        return all(slot in self.pairs.versions for slot in slots)

    def choose(self, routes: Routes) -> list[tuple[Stack, Gathered]]:
        """Return the stacks that a batch needs, and its rows in their order; other adapters are not worth one."""
        asked = routes.slots_together, self.pairs.edition
        if asked != self._chosen_for:
            self._chosen, self._chosen_for = self._hold(routes.slots_together), asked
        return [(stack, gather(order, routes, self.pairs.pool)) for stack, order in self._chosen]

    def _hold(self, slots: Sequence[int]) -> list[tuple[Stack, tuple[int, ...]]]:
        groups: dict[tuple[int, ...], list[int]] = {}
        for slot in slots:
            if slot in self.pairs.plain:
                groups.setdefault(self.pairs.ranks_of(slot), []).append(slot)
        found = []
        for ranks, own in groups.items():
            if len(own) >= FEWEST:
                stack = self._stacks.setdefault(ranks, Stack(self.pairs, ranks))
                found.append((stack, tuple(stack.hold(own))))
        return found


def gather(order: tuple[int, ...], routes: Routes, like: torch.Tensor) -> Gathered:
    """Return the rows of adapters in an order, made once for all linears of a step."""
    if order not in routes.gathered:
        most = max(len(routes.by_slot[slot][0]) for slot in order)
        rows: list[int] = []
        weights: list[float] = []
        for slot in order:
            own, own_weights = routes.by_slot[slot]
            empty = most - len(own)
            rows += own + own[:1] * empty
            weights += own_weights + [0.0] * empty
        as_they_are = rows == list(range(len(routes.slots)))
        routes.gathered[order] = Gathered(
            None if as_they_are else torch.tensor(rows, device=like.device),
            None
            if all(weight == 1 for weight in weights)
            else torch.tensor(weights, dtype=like.dtype, device=like.device).view(len(order), most, 1),
        )
    return routes.gathered[order]


def _longer(tensor: torch.Tensor, size: int) -> torch.Tensor:
    longer = tensor.new_empty(size, *tensor.shape[1:])
    longer[: len(tensor)] = tensor
    return longer
