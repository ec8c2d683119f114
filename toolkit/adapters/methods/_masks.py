"""Masks over many weights: the smallest entries of all of them together, and eight bits to a byte."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor


def pack_bits(bits: Tensor) -> Tensor:
    """Return `[N]` bools as `[ceil(N / 8)]` uint8, the first in the lowest bit."""
    padded = torch.nn.functional.pad(bits.to(torch.uint8), (0, -len(bits) % 8)).reshape(-1, 8)
    return (padded << torch.arange(8, dtype=torch.uint8, device=bits.device)).sum(1, dtype=torch.uint8)


def unpack_bits(packed: Tensor, count: int) -> Tensor:
    """Return the first `count` bits as bools."""
    places = torch.arange(8, dtype=torch.uint8, device=packed.device)
    return ((packed[:, None] >> places) & 1).flatten()[:count].bool()


def smallest(scores: Sequence[Callable[[], Tensor]], count: int) -> Iterator[Tensor]:
    """Find exactly `count` smallest entries over several tensors without holding them all.

    Floats that are not negative are ordered as their bits are, so two rounds of counting, by the upper and by the
    lower half of the bits, find the largest value to be removed. Of entries equal to it the first are.

    Args:
        scores: each returns a tensor of float32 that are not negative; called three times.
        count: entries to find, of all.

    Yields:
        For each tensor a bool of its shape: which of its entries are among them.
    """
    upper, below = _bucket([lambda s=s: _bits(s()) >> 16 for s in scores], count)
    lower, rest = _bucket([lambda s=s: _lower_half(_bits(s()), upper) for s in scores], count - below)
    limit, left = (upper << 16) | lower, count - below - rest
    for score in scores:
        bits = _bits(score())
        equal = bits == limit
        chosen = equal & (equal.flatten().cumsum(0).reshape(equal.shape) <= left)
        left -= int(chosen.sum())
        yield (bits < limit) | chosen


def _bits(score: Tensor) -> Tensor:
    return score.float().contiguous().view(torch.int32)


def _lower_half(bits: Tensor, upper: int) -> Tensor:
    return bits[bits >> 16 == upper] & 0xFFFF


def _bucket(halves: Sequence[Callable[[], Tensor]], count: int) -> tuple[int, int]:
    """Return the value at which the sorted entries pass `count`, and how many lie below it."""
    counts = sum(torch.bincount(half().flatten(), minlength=1 << 16).cpu() for half in halves)
    assert isinstance(counts, Tensor)
    through = counts.cumsum(0)
    value = min(int(torch.searchsorted(through, count)), len(counts) - 1)
    return value, int(through[value] - counts[value])
