"""What decoding reads keys and values from: a cache in full precision, or a quantised one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from toolkit.kernels.kv_quant.cache import QuantizedCache


@dataclass(frozen=True)
class PlainCache:
    """Keys and values `[P, page, G, D]` as the model made them.

    Attributes:
        k: keys.
        v: values.
        first_pages: of each sequence whose pages follow each other; may be empty.
    """

    k: torch.Tensor
    v: torch.Tensor
    first_pages: Sequence[int | None] = ()

    @property
    def lies_together(self) -> bool:
        """Whether neighbouring pages are one plain run of tokens."""
        return all(t.stride(0) == t.shape[1] * t.stride(1) for t in (self.k, self.v))

    @property
    def page(self) -> int:
        """Tokens of a page."""
        return self.k.shape[1]

    @property
    def heads(self) -> int:
        """Key/value heads."""
        return self.k.shape[2]

    def read(self, pages: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the keys and values of pages, `[..., page, G, D]` each for pages `[...]`."""
        shape = (*pages.shape, *self.k.shape[1:])
        # Faster on a CPU than indexing.
        return tuple(t.index_select(0, pages.reshape(-1)).view(shape) for t in (self.k, self.v))  # pyright: ignore[reportReturnType]


Cache = PlainCache | QuantizedCache
