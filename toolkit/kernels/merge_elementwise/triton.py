"""The Triton kernel of element-wise merging: one thread loads, drops, elects, adds up and stores an element.

A tile begins at a multiple of its size in the whole tensor, so that it lies in one block of random numbers. Models are
gone through up to three times; after the first, what a tile reads is still in the multiprocessor's own cache.
"""

from __future__ import annotations

import triton
import triton.language as tl

LARGEST, RANDOM = tl.constexpr(1), tl.constexpr(2)
WEIGHTED, TOTAL, FREQUENCY = tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)
ONE_SHARE, SHARES = tl.constexpr(1), tl.constexpr(2)


@triton.jit
def _hash(word):
    """32 bits to 32 bits, one to one: Chris Wellons' "lowbias32"."""
    word = (word ^ (word >> 16)) * 0x7FEB352D
    word = (word ^ (word >> 15)) * 0x846CA68B
    return word ^ (word >> 16)


@triton.jit
def _kept(
    x_ptr, kept_ptr, keys_ptr, factors_ptr, model, x_stride, at, exists, block, blocks, places, KEPT: tl.constexpr
):
    """What is kept of some elements of a model, float32; what is dropped is multiplied by 0."""
    x = tl.load(x_ptr + tl.cast(model, tl.int64) * x_stride + at, mask=exists, other=0).to(tl.float32)
    if KEPT == LARGEST:
        threshold, equal = tl.load(kept_ptr + 2 * model), tl.load(kept_ptr + 2 * model + 1)
        bits = (x.to(tl.int32, bitcast=True) & 0x7FFFFFFF).to(tl.int64)
        x *= ((bits > threshold) | ((bits == threshold) & (at < equal))).to(tl.float32)
    elif KEPT == RANDOM:
        key_ptr = keys_ptr + 2 * (model * blocks + block)
        stride, offset = tl.load(key_ptr).to(tl.uint32, bitcast=True), tl.load(key_ptr + 1).to(tl.uint32, bitcast=True)
        drawn = _hash(places.to(tl.uint32) * stride + offset)
        x *= (drawn.to(tl.int64) < tl.load(kept_ptr + 2 * model)).to(tl.float32)
        x *= tl.load(factors_ptr + model)
    return x


@triton.jit
def _agreeing(x, flip):
    """A weighted element where it has the elected sign, as a positive number, else 0."""
    bits = x.to(tl.int32, bitcast=True) ^ flip
    return tl.maximum(bits.to(tl.float32, bitcast=True), 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _merge_elements(
    x_ptr,
    base_ptr,
    out_ptr,
    weights_ptr,
    kept_ptr,
    keys_ptr,
    factors_ptr,
    shares_ptr,
    order_ptr,
    models,
    count,
    shift,
    lead,
    blocks,
    x_stride,
    zero_flip,
    common,
    scale,
    KEPT: tl.constexpr,
    VOTE: tl.constexpr,
    DIVISOR: tl.constexpr,
    COMMON: tl.constexpr,
    BASE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Merge BLOCK elements of all models; grid (tiles,)."""
    first = tl.program_id(0).to(tl.int64) * BLOCK
    at = first - shift + tl.arange(0, BLOCK)
    exists = (at >= 0) & (at < count)
    block = (first + lead) // 65536
    places = ((first + lead) % 65536).to(tl.int32) + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    flip = tl.zeros((BLOCK,), tl.int32)
    if VOTE:
        votes = tl.zeros((BLOCK,), tl.float32)
        for model in range(models):
            x = _kept(x_ptr, kept_ptr, keys_ptr, factors_ptr, model, x_stride, at, exists, block, blocks, places, KEPT)
            if VOTE == WEIGHTED:
                x *= tl.load(weights_ptr + model)
            elif VOTE == FREQUENCY:
                x = tl.where(x > 0, 1.0, tl.where(x < 0, -1.0, x))
            votes += x
        # Minus zero plus zero is zero, whose sign is plus.
        flip = (votes + 0.0).to(tl.int32, bitcast=True) & -2147483648
        flip = tl.where(votes == 0, zero_flip, flip)
    agree = tl.zeros((BLOCK,), tl.int32)
    for model in range(models):
        x = _kept(x_ptr, kept_ptr, keys_ptr, factors_ptr, model, x_stride, at, exists, block, blocks, places, KEPT)
        if not COMMON:
            x *= tl.load(weights_ptr + model)
        if VOTE:
            x = _agreeing(x, flip)
            agree += (x != 0).to(tl.int32)
        total += x
    if COMMON:
        total *= common
    if DIVISOR == ONE_SHARE:
        total = tl.math.div_rn(total, tl.maximum(agree, 1).to(tl.float32) * common)
    elif DIVISOR == SHARES:
        # Models of one share follow each other in this order; the last of them adds what they come to.
        divisor = tl.zeros((BLOCK,), tl.float32)
        agree = tl.zeros((BLOCK,), tl.int32)
        for i in range(models):
            model = tl.load(order_ptr + 2 * i)
            x = _kept(x_ptr, kept_ptr, keys_ptr, factors_ptr, model, x_stride, at, exists, block, blocks, places, KEPT)
            agree += (_agreeing(x * tl.load(weights_ptr + model), flip) != 0).to(tl.int32)
            if tl.load(order_ptr + 2 * i + 1) == 1:
                divisor += agree.to(tl.float32) * tl.load(shares_ptr + model)
                agree = tl.zeros((BLOCK,), tl.int32)
        total = tl.math.div_rn(total, tl.where(divisor == 0, 1.0, divisor))
    if VOTE:
        total = (total.to(tl.int32, bitcast=True) ^ flip).to(tl.float32, bitcast=True)
    total *= scale
    if BASE:
        total += tl.load(base_ptr + at, mask=exists, other=0).to(tl.float32)
    tl.store(out_ptr + at, total, mask=exists)
