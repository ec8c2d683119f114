"""The Triton kernel that merges partial attention, and the steps of attention that all its kernels share.

Inside kernels exponentials and logarithms are to the base 2, which the hardware has; sums that are stored are natural.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def capped(scores, soft_cap):
    """`cap * tanh(scores / cap)`, by an exponential that cannot overflow."""
    decay = tl.exp2(tl.abs(scores) / soft_cap * (-2 * LOG2E))
    size = soft_cap * (1 - decay) / (1 + decay)
    return tl.where(scores < 0, -size, size)


@triton.jit
def absorb(scores, values, most, total, out):
    """Add a tile of keys to a running state: the online softmax, whose output is divided once at the end.

    Args:
        scores: `[M, N]` to the base 2, minus infinity where a key is not seen.
        values: `[N, D]`.
        most: `[M]`, the largest score so far.
        total: `[M]`, sum of exponentials relative to it.
        out: `[M, D]`, the sum of values weighted so.
    """
    larger = tl.maximum(most, tl.max(scores, axis=1))
    # Minus infinity minus itself is not a number; without any key, any other base gives zeros.
    base = tl.where(larger == float("-inf"), 0.0, larger)
    shares = tl.exp2(scores - base[:, None])
    decay = tl.exp2(most - base)
    out = tl.dot(shares.to(values.dtype), values, out * decay[:, None], input_precision="ieee")
    return larger, total * decay + tl.sum(shares, axis=1), out


@triton.jit
def finish(most, total, out):
    """The output of a running state and its natural logarithm of sums; 0 and minus infinity without any key."""
    seen = total > 0
    out = out / tl.where(seen, total, 1.0)[:, None]
    return out, tl.where(seen, (most + tl.log2(tl.where(seen, total, 1.0))) * LN2, float("-inf"))


@triton.jit
def _merge(
    part_ptr,
    part_lse_ptr,
    out_ptr,
    lse_ptr,
    sinks_ptr,
    bounds_ptr,
    entries_ptr,
    heads,
    GROUP: tl.constexpr,
    SINKS: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Merge the parts of one query and head; grid (queries, heads).

    Heads go by groups of GROUP: `entries` holds for each query and group which rows of the parts begin its heads.
    """
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    group = row * (heads // GROUP) + head // GROUP
    ds = tl.arange(0, BLOCK_D)
    most, total = float("-inf"), 0.0
    if SINKS:
        most, total = tl.load(sinks_ptr + head).to(tl.float32), 1.0
    out = tl.zeros((BLOCK_D,), tl.float32)
    for entry in range(tl.load(bounds_ptr + group), tl.load(bounds_ptr + group + 1)):
        part = tl.load(entries_ptr + entry).to(tl.int64) + head % GROUP
        lse = tl.load(part_lse_ptr + part).to(tl.float32)
        larger = tl.maximum(most, lse)
        base = tl.where(larger == float("-inf"), 0.0, larger)
        decay, share = tl.exp2((most - base) * LOG2E), tl.exp2((lse - base) * LOG2E)
        out = out * decay + share * tl.load(part_ptr + part * SIZE + ds, mask=ds < SIZE, other=0).to(tl.float32)
        total = total * decay + share
        most = larger
    seen = total > 0
    safe = tl.where(seen, total, 1.0)
    tl.store(out_ptr + (row * heads + head) * SIZE + ds, (out / safe).to(out_ptr.dtype.element_ty), mask=ds < SIZE)
    tl.store(lse_ptr + row * heads + head, tl.where(seen, most + tl.log2(safe) * LN2, float("-inf")))
