"""Numbers of a few bits whose values are quantiles of a normal distribution (2305.14314, NormalFloat), in blocks."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor
from torch.nn import functional

from toolkit.adapters.methods._masks import pack_bits, unpack_bits


@cache
def normal_values(bits: int) -> Tensor:
    """Return the values of all codes, `[2^bits]` float32, ascending from -1 to 1; one of them is exactly 0."""
    count = 2**bits
    end = 1 - (1 / (count - 1) + 1 / count) / 4
    above = torch.special.ndtri(torch.linspace(end, 0.5, count // 2 + 1, dtype=torch.float64)[:-1])
    below = -torch.special.ndtri(torch.linspace(end, 0.5, count // 2, dtype=torch.float64)[:-1])
    return (torch.cat([above, torch.zeros(1, dtype=torch.float64), below]).sort().values / above.max()).float()


def storage_bits(count: int, bits: int, block: int) -> int:
    """Return the bits that so many entries take: their codes, and 16 for the scale of every block."""
    return count * bits + 16 * -(-count // block)


def quantize(x: Tensor, bits: int, block: int) -> tuple[Tensor, Tensor]:
    """Return the packed codes of a tensor of N entries, `[ceil(N bits / 8)]` uint8, and the scales of its blocks.

    Scales are `[ceil(N / block)]` bfloat16; the last block may be shorter.
    """
    flat = x.flatten().float()
    blocks = functional.pad(flat, (0, -len(flat) % block)).view(-1, block)
    scales = blocks.abs().amax(1).bfloat16()
    shares = blocks / scales.float().clamp_min(torch.finfo(torch.float32).tiny)[:, None]
    values = normal_values(bits).to(x.device)
    codes = torch.bucketize(shares, (values[1:] + values[:-1]) / 2).flatten()[: len(flat)]
    planes = [(codes >> place & 1).bool() for place in range(bits)]
    return pack_bits(torch.cat(planes)), scales


def dequantize(codes: Tensor, scales: Tensor, shape: tuple[int, ...], bits: int, block: int) -> Tensor:
    """Return what `quantize` made codes of, of its shape, float32."""
    count = torch.Size(shape).numel()
    planes = unpack_bits(codes, bits * count).view(bits, count)
    numbers = sum((plane.int() << place for place, plane in enumerate(planes)), torch.zeros((), dtype=torch.int32))
    values = normal_values(bits).to(codes.device)[numbers]
    return (values * scales.float().repeat_interleave(block)[:count]).view(shape)
