"""The one tensor that keys, values and adapters live in.

A page is a run of `page_elements` numbers. For a sequence it holds the keys and values of `page_size` tokens in all
layers; for an adapter it is cut into units, a power of two long, that its factors are laid into:

    page of a sequence:   | K of layer 0 | V of layer 0 | K of layer 1 | ... | a few spare |
    page of an adapter:   | unit | unit | unit | unit | ...                                |

Shape suffixes: P pages, G key/value heads, D features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
        self.layers, self.page_size = dict(layers), page_size
        sizes = {layer: page_size * prod(heads) for layer, heads in layers.items()}
        self.page_elements, unit = page_elements(layers, page_size)
        # Zeros, for what is multiplied with a weight of zero must be finite.
        data = torch.zeros(num_pages, self.page_elements, dtype=dtype, device=device)
        self._data = data
        self.units = data.view(-1, unit)
        self.units_per_page = self.page_elements // unit
        self.keys: dict[int, torch.Tensor] = {}
        self.values: dict[int, torch.Tensor] = {}
        at = 0
        for layer, heads in layers.items():
            for side in (self.keys, self.values):
                side[layer] = data[:, at : at + sizes[layer]].view(num_pages, page_size, *heads)
                at += sizes[layer]

    @classmethod
    def like(cls, other: Memory, num_pages: int) -> Memory:
        """Return a memory of the same layout with another number of pages."""
        data = other.units
        return cls(other.layers, num_pages, other.page_size, data.dtype, data.device)

    @property
    def nbytes(self) -> int:
        """Bytes of all pages."""
        return self._data.nbytes

    @property
    def page_bytes(self) -> int:
        """Bytes of a page."""
        return self.page_elements * self._data.itemsize

    def units_of(self, pages: Sequence[int]) -> list[int]:
        """Return the units of some pages."""
        count = self.units_per_page
        return [unit for page in pages for unit in range(page * count, (page + 1) * count)]

    def save(self, start: int, count: int) -> Sequence[torch.Tensor]:
        """Copy neighbouring pages to the host in one transfer."""
        return self._data[start : start + count].to("cpu", copy=True).unbind()

    def load(self, start: int, contents: Sequence[torch.Tensor]) -> None:
        """Copy contents from the host into neighbouring pages."""
        self._data[start : start + len(contents)] = torch.stack(list(contents)).to(self._data.device)


def page_elements(layers: Mapping[int, Heads], page_size: int) -> tuple[int, int]:
    """Return the elements of a page and of a unit."""
    wanted = 2 * page_size * sum(prod(heads) for heads in layers.values())
    unit = _unit(wanted)
    return -(-wanted // unit) * unit, unit


def _unit(page: int) -> int:
    """Return the largest power of two of which rounding a page up to a multiple wastes at most a thirty-second."""
    unit = SMALLEST_UNIT
    while 2 * unit <= min(page // 32, LARGEST_UNIT):
        unit *= 2
    return unit
