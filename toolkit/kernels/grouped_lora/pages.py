"""How the factors of adapters lie in the pages of a pool, for linears that read the same input.

A factor is a matrix with one row per rank: A is `[r, K]`, B lies as its transpose `[r, N]`. Every such *rank row* is
cut into pieces of at most one page. Pieces of the same width share pages, as many as fit, each at a multiple of 16
elements; a list of offsets says where the pieces are, so pages may lie anywhere and no rank is padded to another.

    rank row, K = 11008, page = 4096:   | 4096        | 4096        | 2816      |
    offsets of that row:                  o0            o1            o2            in 16 elements from the pool's start

Shape suffixes: S slots of adapters, P linears, T rows, K input features, N output features, r rank.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import cached_property

import numpy as np
import torch

from toolkit.kernels.grouped_lora.api import Pair
from toolkit.kernels.grouped_lora.stacks import Stacks

ALIGN = 16
"""Elements of which every piece begins at a multiple, so that a GPU loads 16 bytes at a time or more."""

START, RANK, COLUMN = 0, 1, 2
"""What `sides` holds: first entry in the list of offsets, rank rows, their first column among the inner products."""

BIAS, GAIN = 0, 1
"""What `extras` holds."""


class PagedPairs:
    """The factors of all adapters at linears that read the same input: q, k and v, say.

    Side 0 is A: the first factors of all linears under each other, since they multiply the same input. Side `1 + p` is
    B of linear `p`. Backward, sides change places.

    Args:
        pool: `[pages, page]`, contiguous; the page is a power of two and at least 16 elements.
        in_features: K.
        out_features: N of each linear.
        num_slots: adapters that can be placed.

    Attributes:
        versions: of each slot that is taken, a number that no other adapter had or will have.
        edition: grows whenever an adapter comes or goes.
        tables_edition: grows whenever the tables on the device are other tensors, not the same with other contents.
        plain: slots whose adapter only adds a product.
        doras: slots whose adapter rescales an output.
    """

    def __init__(self, pool: torch.Tensor, in_features: int, out_features: Sequence[int], num_slots: int) -> None:
        page = pool.shape[1]
        if page < ALIGN or page & (page - 1) or not pool.is_contiguous():
            raise ValueError(
                f"a pool is contiguous with pages of a power of two of at least {ALIGN} elements, not {page}"
            )
        self.pool, self.page = pool, page
        self.widths = (in_features, *out_features)
        self.num_slots = num_slots
        linears = len(out_features)
        self._sides = np.zeros((1 + linears, 3, num_slots), np.int32)
        self._scales = np.ones((1 + linears, num_slots), np.float32)
        self._extras = np.full((linears, 2, num_slots), -1, np.int32)
        self._lists: dict[int, np.ndarray] = {}
        self._pairs: dict[tuple[int, int], Pair | None] = {}
        self._firsts: dict[int, torch.Tensor] = {}
        self._offsets = np.zeros(0, np.int32)
        self._used = 0
        self.versions: dict[int, int] = {}
        self.edition = 0
        self.plain: set[int] = set()
        self.doras: set[int] = set()
        self._ranks: dict[int, tuple[int, ...]] = {}
        self._placed = itertools.count()
        self._tables: tuple[torch.Tensor, ...] = ()
        self._is_uploaded = False
        self.tables_edition = 0

    @property
    def sides(self) -> torch.Tensor:
        """`[1 + P, 3, S]` int32: `START`, `RANK` and `COLUMN` of each side and slot."""
        return self._on_device()[0]

    @property
    def scales(self) -> torch.Tensor:
        """`[1 + P, S]` float32, 1 on side 0."""
        return self._on_device()[1]

    @property
    def extras(self) -> torch.Tensor:
        """`[P, 2, S]` int32: first entry in the offsets of the row of `BIAS` and of `GAIN`; -1 is none."""
        return self._on_device()[2]

    @property
    def offsets(self) -> torch.Tensor:
        """int32: where pieces begin, in units of `ALIGN` elements."""
        return self._on_device()[3]

    @property
    def ranks(self) -> np.ndarray:
        """`[S]`: inner products of a row with the adapter of each slot; 0 where there is none."""
        return self._sides[0, RANK]

    @cached_property
    def stacks(self) -> Stacks:
        """Copies for batched products."""
        return Stacks(self)

    @property
    def has_extras(self) -> np.ndarray:
        """`[S]`: the adapter adds a bias or rescales an output."""
        return np.asarray((self._extras >= 0).any(axis=(0, 1)))

    @property
    def is_dora(self) -> np.ndarray:
        """`[S]`: the adapter rescales an output."""
        return np.asarray((self._extras[:, GAIN] >= 0).any(axis=0))

    def pieces(self, width: int) -> int:
        """Return into how many pieces a rank row of that width is cut."""
        return -(-width // self.page)

    def pages_for(self, pairs: Sequence[Pair | None]) -> int:
        """Return how many pages an adapter takes."""
        rows: dict[int, int] = defaultdict(int)
        for pair, width in zip(pairs, self.widths[1:], strict=True):
            if pair is not None:
                rank = pair.a_rK.shape[0]
                rows[self.widths[0]] += rank
                rows[width] += rank + (pair.bias_N is not None) + (pair.gain_N is not None)
        counts: dict[int, int] = defaultdict(int)
        for width, count in rows.items():
            whole, rest = divmod(width, self.page)
            counts[self.page] += count * whole
            if rest:
                counts[rest] += count
        return sum(-(-count // self._per_page(width)) for width, count in counts.items())

    def place(self, slot: int, pairs: Sequence[Pair | None], pages: Sequence[int]) -> None:
        """Copy an adapter into pages of the pool.

        Args:
            slot: that nobody has.
            pairs: of each linear, `None` where the adapter leaves it alone.
            pages: `pages_for(pairs)` of them, in any order.

        Raises:
            ValueError: a factor of another shape, or another number of pages.
        """
        self._check(pairs)
        if len(pages) != self.pages_for(pairs):
            raise ValueError(f"the adapter takes {self.pages_for(pairs)} pages, not {len(pages)}")
        assert slot not in self._lists, f"slot {slot} is taken"
        self._forget(slot)
        self._lists[slot] = self._copy(_matrices(pairs), list(pages))
        ranks = [0 if pair is None else len(pair.a_rK) for pair in pairs]
        self._sides[0, RANK, slot] = sum(ranks)
        self._sides[1:, RANK, slot] = ranks
        self._sides[1:, COLUMN, slot] = np.cumsum([0, *ranks[:-1]])
        self._scales[1:, slot] = [1.0 if pair is None else pair.scale for pair in pairs]
        for linear, pair in enumerate(pairs):
            rows = (None, None) if pair is None else (pair.bias_N, pair.gain_N)
            self._extras[linear, :, slot] = [-1 if row is None else 0 for row in rows]
        self.versions[slot], self._ranks[slot] = next(self._placed), tuple(ranks)
        if (self._extras[:, :, slot] < 0).all():
            self.plain.add(slot)
        if (self._extras[:, GAIN, slot] >= 0).any():
            self.doras.add(slot)
        self.edition += 1
        self._append(slot)
        self._is_uploaded = False

    def clear(self, slot: int) -> None:
        """Forget the adapter of a slot; its pages are the caller's again."""
        del self._lists[slot], self.versions[slot], self._ranks[slot]
        self.plain.discard(slot)
        self.doras.discard(slot)
        self._forget(slot)
        self._sides[:, :, slot] = 0
        self._extras[:, :, slot] = -1
        self.edition += 1
        self._is_uploaded = False

    def _forget(self, slot: int) -> None:
        """Drop what was read of a slot, be it that there was nothing."""
        self._firsts.pop(slot, None)
        for linear in range(len(self.widths) - 1):
            self._pairs.pop((slot, linear), None)

    def ranks_of(self, slot: int) -> tuple[int, ...]:
        """Return an adapter's rank at each linear."""
        return self._ranks[slot]

    def pair(self, slot: int, linear: int) -> Pair | None:
        """Do what `read` does, but only once for each adapter; its A is a part of `first_factors`."""
        if (slot, linear) not in self._pairs:
            _, rank, at = self._sides[1 + linear, :, slot].tolist()
            a_rK = self.first_factors(slot)[at : at + rank]
            self._pairs[slot, linear] = self._pair(slot, linear, a_rK) if len(a_rK) else None
        return self._pairs[slot, linear]

    def first_factors(self, slot: int) -> torch.Tensor:
        """Return A of all linears under each other, `[R, K]`; reads it only once for each adapter."""
        if slot not in self._firsts:
            start, rank, _ = self._sides[0, :, slot].tolist()
            self._firsts[slot] = self._read(start, rank, self.widths[0])
        return self._firsts[slot]

    def elements(self, slot: int, linear: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return which elements of the flat pool are an adapter's A, `[r, K]`, and its B, `[N, r]`."""
        (a, b), rank = self._starts(slot, linear), int(self._sides[1 + linear, RANK, slot])
        a_rK, b_rN = self._elements(a, rank, self.widths[0]), self._elements(b, rank, self.widths[1 + linear])
        return a_rK, b_rN.T

    def _starts(self, slot: int, linear: int) -> tuple[int, int]:
        """Return the first entries of A and of B in the list of offsets."""
        before = int(self._sides[1 + linear, COLUMN, slot]) * self.pieces(self.widths[0])
        return int(self._sides[0, START, slot]) + before, int(self._sides[1 + linear, START, slot])

    def read(self, slot: int, linear: int) -> Pair | None:
        """Read an adapter's factors at a linear back: views where the pieces lie evenly, else copies."""
        (a, _), rank = self._starts(slot, linear), int(self._sides[1 + linear, RANK, slot])
        return self._pair(slot, linear, self._read(a, rank, self.widths[0])) if rank else None

    def _pair(self, slot: int, linear: int, a_rK: torch.Tensor) -> Pair:
        (_, b), rank, width = self._starts(slot, linear), len(a_rK), self.widths[1 + linear]
        rows = self._extras[linear, :, slot].tolist()
        bias, gain = (None if row < 0 else self._read(row, 1, width)[0] for row in rows)
        return Pair(a_rK, self._read(b, rank, width).T, gain, float(self._scales[1 + linear, slot]), bias)

    def _per_page(self, width: int) -> int:
        return self.page // (-(-width // ALIGN) * ALIGN)

    def _check(self, pairs: Sequence[Pair | None]) -> None:
        if len(pairs) != len(self.widths) - 1:
            raise ValueError(f"{len(pairs)} pairs for {len(self.widths) - 1} linears")
        for pair, width in zip(pairs, self.widths[1:], strict=True):
            if pair is None:
                continue
            rank = len(pair.a_rK)
            given, wanted = (pair.a_rK.shape, pair.b_Nr.shape), ((rank, self.widths[0]), (width, rank))
            if given != wanted:
                raise ValueError(f"factors of shapes {given}, expected {wanted}")

    def _copy(self, matrices: Sequence[torch.Tensor], pages: list[int]) -> np.ndarray:
        """Write matrices into pages, pieces of one width together; return the offsets, matrix after matrix."""
        sources: dict[int, list[torch.Tensor]] = defaultdict(list)
        places: dict[int, list[np.ndarray]] = defaultdict(list)
        offsets = [np.zeros((matrix.shape[0], self.pieces(matrix.shape[1])), np.int64) for matrix in matrices]
        for matrix, own in zip(matrices, offsets, strict=True):
            for piece in range(own.shape[1]):
                part = matrix[:, piece * self.page : (piece + 1) * self.page]
                sources[part.shape[1]].append(part)
                places[part.shape[1]].append(own[:, piece])
        for width, parts in sources.items():
            count = sum(map(len, parts))
            begins = self._write(parts, count, [pages.pop(0) for _ in range(-(-count // self._per_page(width)))])
            for place in places[width]:
                place[:], begins = begins[: len(place)], begins[len(place) :]
        return np.concatenate([own.ravel() for own in offsets]) if offsets else np.zeros(0, np.int64)

    def _write(self, parts: Sequence[torch.Tensor], count: int, pages: Sequence[int]) -> np.ndarray:
        """Write the rows of matrices of one width, `count` in all, into pages; return where each begins."""
        width, device, dtype = parts[0].shape[1], self.pool.device, self.pool.dtype
        per_page, step = self._per_page(width), self.page // self._per_page(width) // ALIGN * ALIGN
        index = np.arange(count)
        begins = np.asarray(pages, np.int64)[index // per_page] * self.page + index % per_page * step
        parts = [part.to(device, dtype) for part in parts]
        if np.array_equal(begins, begins[0] + index * width):  # nothing lies between them
            torch.cat(parts, out=self.pool.view(-1)[begins[0] : begins[0] + count * width].view(count, width))
            return begins
        held = torch.zeros(len(pages) * per_page, step, dtype=dtype, device=device)
        torch.cat(parts, out=held[:count, :width])
        view = self.pool[:, : per_page * step]
        view[torch.tensor(list(pages), dtype=torch.int64, device=device)] = held.view(len(pages), -1)
        return begins

    def _append(self, slot: int) -> None:
        """Put a slot's offsets behind the others; start a larger list with the living ones when it is full."""
        own = self._lists[slot]
        if self._used + len(own) > len(self._offsets):
            living = sum(len(other) for other in self._lists.values())
            self._offsets, self._used = np.zeros(2 * living + 64, np.int32), 0
            for other in self._lists:
                self._register(other)
        else:
            self._register(slot)

    def _register(self, slot: int) -> None:
        """Copy a slot's offsets to the end of the list and note where its matrices begin there."""
        own, at = self._lists[slot], self._used
        self._offsets[at : at + len(own)] = own // ALIGN
        self._used += len(own)
        for side, width in enumerate(self.widths):
            self._sides[side, START, slot] = at
            at += int(self._sides[side, RANK, slot]) * self.pieces(width)
        for linear, kind in _extra_rows(len(self.widths) - 1):
            if self._extras[linear, kind, slot] >= 0:
                self._extras[linear, kind, slot] = at
                at += self.pieces(self.widths[1 + linear])

    def _on_device(self) -> tuple[torch.Tensor, ...]:
        self.upload()
        return self._tables

    def upload(self) -> None:
        """Bring the tables on the device up to date, in their places while they have room."""
        if self._is_uploaded:
            return
        tables = [torch.from_numpy(t) for t in (self._sides, self._scales, self._extras, self._offsets)]
        if [t.shape for t in tables] == [t.shape for t in self._tables]:
            for held, table in zip(self._tables, tables, strict=True):
                held.copy_(table)
        else:
            self._tables = tuple(table.to(self.pool.device, copy=True) for table in tables)
            self.tables_edition += 1
        self._is_uploaded = True

    def _read(self, start: int, count: int, width: int) -> torch.Tensor:
        flat, pieces = self.pool.view(-1), self.pieces(width)
        if pieces > 1 or not count:
            return flat[self._elements(start, count, width)]
        begins = self._offsets[start : start + count].tolist()
        step = begins[1] - begins[0] if count > 1 else -(-width // ALIGN)
        if step > 0 and begins == list(range(begins[0], begins[0] + count * step, step)):
            return flat.as_strided((count, width), (step * ALIGN, 1), begins[0] * ALIGN)
        # All rows that could begin anywhere, of which the right ones are copied.
        rows = flat.as_strided(((len(flat) - width) // ALIGN + 1, width), (ALIGN, 1))
        return rows[torch.tensor(begins, device=flat.device)]

    def _elements(self, start: int, count: int, width: int) -> torch.Tensor:
        pieces, columns = self.pieces(width), np.arange(width)
        begins = self._offsets[start : start + count * pieces].reshape(count, pieces).astype(np.int64) * ALIGN
        return torch.from_numpy(begins[:, columns // self.page] + columns % self.page).to(self.pool.device)


def _extra_rows(linears: int) -> Iterator[tuple[int, int]]:
    return ((linear, kind) for linear in range(linears) for kind in (BIAS, GAIN))


def _matrices(pairs: Sequence[Pair | None]) -> list[torch.Tensor]:
    """Return all rows of an adapter as matrices: A of each linear, B transposed of each, then biases and gains."""
    present = [pair for pair in pairs if pair is not None]
    rows = [row for pair in present for row in (pair.bias_N, pair.gain_N) if row is not None]
    matrices = [pair.a_rK for pair in present] + [pair.b_Nr.T for pair in present] + [row[None] for row in rows]
    return [matrix for matrix in matrices if matrix.shape[0]]
