"""Where quantised keys and values lie.

Codes of a head's tokens lie next to each other, so that one page of one head is one run of memory. In 4 bits a byte
holds two neighbouring features, the first in its low half.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class QuantizedCache:
    """Keys and values of one layer in pages, as codes; a number is `low + code * scale`.

    Attributes:
        bits: 8 or 4.
        k_codes: `[P, G, page, D * bits / 8]` uint8.
        k_scale: `[P, G, D]`, in the dtype of the model, as are the other scales and lows.
        k_low: the same.
        v_codes: as of keys.
        v_scale: `[P, G, page]`.
        v_low: the same.
    """

    bits: int
    k_codes: torch.Tensor
    k_scale: torch.Tensor
    k_low: torch.Tensor
    v_codes: torch.Tensor
    v_scale: torch.Tensor
    v_low: torch.Tensor

    @classmethod
    def empty(
        cls, num_pages: int, page: int, heads: int, size: int, *, bits: int, dtype: torch.dtype, device: torch.device
    ) -> QuantizedCache:
        """Make a cache whose pages hold nothing yet.

        Args:
            num_pages: pages.
            page: tokens of a page, a power of two and at least 16.
            heads: key/value heads.
            size: features, an even number.
            bits: of a code.
            dtype: of scales and of what codes stand for.
            device: where it lies.

        Raises:
            ValueError: another number of bits, another page, or an odd number of features.
        """
        if bits not in (4, 8) or page < 16 or page & (page - 1) or size % 2:
            raise ValueError(
                f"{bits} bits, pages of {page} tokens, {size} features; codes have 4 or 8 bits, pages a power of two of"
                " at least 16 tokens, and features are even in number"
            )
        codes = [torch.zeros(num_pages, heads, page, size * bits // 8, dtype=torch.uint8, device=device) for _ in "kv"]
        k = [torch.zeros(num_pages, heads, size, dtype=dtype, device=device) for _ in range(2)]
        v = [torch.zeros(num_pages, heads, page, dtype=dtype, device=device) for _ in range(2)]
        return cls(bits, codes[0], k[0], k[1], codes[1], v[0], v[1])

    @property
    def page(self) -> int:
        """Tokens of a page."""
        return self.k_codes.shape[2]

    @property
    def heads(self) -> int:
        """Key/value heads."""
        return self.k_codes.shape[1]

    @property
    def size(self) -> int:
        """Features of a head."""
        return self.k_scale.shape[2]

    @property
    def dtype(self) -> torch.dtype:
        """What codes stand for."""
        return self.k_scale.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales and lows."""
        tensors = (self.k_codes, self.k_scale, self.k_low, self.v_codes, self.v_scale, self.v_low)
        return sum(t.nbytes for t in tensors)

    def read(self, pages: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the keys and values of pages, `[..., page, G, D]` each for pages `[...]`."""
        k = self._numbers(self.k_codes[pages], self.k_scale[pages][..., None, :], self.k_low[pages][..., None, :])
        v = self._numbers(self.v_codes[pages], self.v_scale[pages][..., None], self.v_low[pages][..., None])
        return k.transpose(-3, -2), v.transpose(-3, -2)

    def _numbers(self, codes: torch.Tensor, scale: torch.Tensor, low: torch.Tensor) -> torch.Tensor:
        if self.bits == 4:
            codes = torch.stack([codes & 15, codes >> 4], dim=-1).flatten(-2)
        return (low.float() + codes.float() * scale.float()).to(self.dtype)
