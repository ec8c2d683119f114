"""The one tensor that keys, values and adapters live in.

A page is `page_elements` numbers, a chunk of them for the keys and one for the values of each layer. For a sequence it
holds those of `page_size` tokens; for an adapter its chunks are cut into units, a power of two long, that factors are
laid into:

    pages                    0          1          2
    K of layer 0        |  chunk   |  chunk   |  chunk   | ...    of a sequence: 16 tokens
    V of layer 0        |  chunk   |  chunk   |  chunk   | ...    of an adapter: | unit | unit | unit | unit |
    K of layer 1        |  chunk   |  chunk   |  chunk   | ...

What one layer reads lies together, so the tokens of a sequence whose pages follow each other are one plain tensor.

Shape suffixes: P pages, G key/value heads, D features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import accumulate
from math import prod

import torch

SMALLEST_UNIT, LARGEST_UNIT = 16, 4096
"""Elements of the units that adapters are laid into."""

Heads = tuple[int, int]
"""Key/value heads and features of a layer."""


class Memory:
    """Pages on the device.

    Args:
        layers: heads and features of each layer that attends.
        num_pages: in the pool.
        page_size: tokens of a page.
        dtype: of keys, values and factors.
        device: where they are.

    Attributes:
        units: `[P * units of a page, unit]`, what adapters are laid into.
        units_per_page: of them.
        keys: by layer, `[P, page, G, D]`.
        values: the same.
    """

    def __init__(
        self,
        layers: Mapping[int, Heads],
        num_pages: int,
        page_size: int,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        self.layers, self.page_size, self.num_pages = dict(layers), page_size, num_pages
        self.page_elements, unit = page_elements(layers, page_size)
        # Zeros, for what is multiplied with a weight of zero must be finite.
        self.units = torch.zeros(num_pages * self.page_elements // unit, unit, dtype=dtype, device=device)
        self.units_per_page = self.page_elements // unit
        self.keys: dict[int, torch.Tensor] = {}
        self.values: dict[int, torch.Tensor] = {}
        self._chunks: list[torch.Tensor] = []
        rest = self.units.flatten()
        for layer, heads in layers.items():
            size = page_size * prod(heads)
            for side in (self.keys, self.values):
                count = num_pages * _rounded(size, unit)
                chunks, rest = rest[:count].view(num_pages, -1), rest[count:]
                self._chunks.append(chunks)
                side[layer] = chunks[:, :size].view(num_pages, page_size, *heads)

    @classmethod
    def like(cls, other: Memory, num_pages: int) -> Memory:
        """Return a memory of the same layout with another number of pages."""
        data = other.units
        return cls(other.layers, num_pages, other.page_size, data.dtype, data.device)

    @property
    def nbytes(self) -> int:
        """Bytes of all pages."""
        return self.units.nbytes

    @property
    def page_bytes(self) -> int:
        """Bytes of a page."""
        return self.page_elements * self.units.itemsize

    def units_of(self, pages: Sequence[int]) -> list[int]:
        """Return the units of some pages, those of a page together."""
        return [unit for page in pages for first, count in self._places for unit in self._range(page, first, count)]

    @cached_property
    def _places(self) -> list[tuple[int, int]]:
        """First unit of each kind of chunk, and units of one."""
        counts = [chunks.shape[1] // self.units.shape[1] for chunks in self._chunks]
        return [
            (self.num_pages * before, count)
            for before, count in zip(accumulate(counts, initial=0), counts, strict=False)
        ]

    @staticmethod
    def _range(page: int, first: int, count: int) -> range:
        return range(first + page * count, first + (page + 1) * count)

    def save(self, start: int, count: int) -> Sequence[torch.Tensor]:
        """Copy neighbouring pages to the host in one transfer."""
        pages = torch.cat([chunks[start : start + count] for chunks in self._chunks], dim=1)
        return pages.to("cpu").unbind()

    def load(self, start: int, contents: Sequence[torch.Tensor]) -> None:
        """Copy contents from the host into neighbouring pages, in one transfer."""
        pages = torch.stack(list(contents)).to(self.units.device)
        parts = pages.split([chunks.shape[1] for chunks in self._chunks], dim=1)
        for chunks, part in zip(self._chunks, parts, strict=True):
            chunks[start : start + len(contents)] = part


def page_elements(layers: Mapping[int, Heads], page_size: int) -> tuple[int, int]:
    """Return the elements of a page and of a unit: the largest power of two that wastes at most a thirty-second."""
    sizes = [page_size * prod(heads) for heads in layers.values()]
    unit = SMALLEST_UNIT
    while 2 * unit <= LARGEST_UNIT and 32 * sum(_rounded(size, 2 * unit) for size in sizes) <= 33 * sum(sizes):
        unit *= 2
    return 2 * sum(_rounded(size, unit) for size in sizes), unit


def _rounded(size: int, unit: int) -> int:
    return -(-size // unit) * unit
