"""The specification: the least and the largest of each channel or token, and equal steps in between."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from toolkit.kernels.kv_quant.cache import QuantizedCache


def quantize_pages(
    k_cache: torch.Tensor, v_cache: torch.Tensor, cache: QuantizedCache, pages: Sequence[tuple[int, int, int]]
) -> None:
    """See the api."""
    for source, target, count in pages:
        for numbers, codes, scale, low, dim in (
            (k_cache[source, :count], cache.k_codes, cache.k_scale, cache.k_low, -2),
            (v_cache[source, :count], cache.v_codes, cache.v_scale, cache.v_low, -1),
        ):
            found = quantize(numbers.transpose(0, 1), cache.bits, dim)
            for into, values in zip((codes[target], scale[target], low[target]), found, strict=True):
                into.zero_()
                into[:, : values.shape[1]] = values


def quantize(numbers: torch.Tensor, bits: int, dim: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return codes, packed along the last dimension, and their scales and lows, which lack `dim`.

    A scale is a little more than a step, so that rounding it to the dtype cannot leave the largest number out.
    """
    low, most = numbers.amin(dim, keepdim=True), numbers.amax(dim, keepdim=True)
    step = (most.float() - low.float()) / (2**bits - 1)
    scale = (step * (1 + torch.finfo(numbers.dtype).eps)).to(numbers.dtype)
    steps = (numbers.float() - low.float()) / scale.float().masked_fill(scale == 0, 1)
    codes = torch.floor(steps + 0.5).clamp(0, 2**bits - 1).to(torch.uint8)
    if bits == 4:
        codes = codes[..., 0::2] | codes[..., 1::2] << 4
    return codes, scale.squeeze(dim), low.squeeze(dim)
