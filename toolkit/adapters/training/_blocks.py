"""Numbers of 8 bits: block-wise dynamic quantisation (2110.02861).

Every block of entries is divided by the largest magnitude in it, and each of them becomes the nearest of 256 values,
which lie the denser the nearer to zero. The signed values have +1 but not -1: the lowest is -0.993, so that a block
whose largest magnitude is a negative entry loses 0.7% of it in every round trip.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor
from torch.nn import functional

_DECADES = 7
"""From 10^0 down to 10^-6."""


@cache
def dynamic_values(signed: bool) -> Tensor:
    """Return the values of all codes, `[256]` float32, ascending.

    A decade holds midpoints between equally distant points of `[0.1, 1]`, half as many as the one above it.
    """
    found = [torch.tensor([0.0, 1.0], dtype=torch.float64)]
    for decade in range(_DECADES):
        count = (64 if signed else 128) >> decade
        midpoints = 0.1 + 0.9 * (torch.arange(count, dtype=torch.float64) + 0.5) / count
        found += [midpoints / 10**decade] + ([-midpoints / 10**decade] if signed else [])
    return torch.cat(found).sort().values.float()


def quantize(x: Tensor, block: int, *, signed: bool) -> tuple[Tensor, Tensor]:
    """Return the codes of a tensor, `[N]` uint8, and the largest magnitude of every block, `[ceil(N / block)]` float32.

    Args:
        x: of any shape with N entries; not negative where `signed` is false.
        block: entries of a block; the last one may be shorter.
        signed: which values to take.
    """
    values = dynamic_values(signed).to(x.device)
    flat = x.flatten().float()
    blocks = functional.pad(flat, (0, -len(flat) % block)).view(-1, block)
    largest = blocks.abs().amax(1)
    shares = blocks / largest.clamp_min(torch.finfo(torch.float32).tiny)[:, None]
    codes = torch.bucketize(shares, (values[1:] + values[:-1]) / 2).to(torch.uint8)
    return codes.flatten()[: len(flat)].clone(), largest


def dequantize(codes: Tensor, largest: Tensor, block: int, *, signed: bool) -> Tensor:
    """Return what `quantize` made codes of, `[N]` float32."""
    values = dynamic_values(signed).to(codes.device)
    return values[codes.int()] * largest.repeat_interleave(block)[: len(codes)]
