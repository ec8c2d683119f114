"""The Triton kernel that quantises pages."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _codes(numbers, scale, low, BITS: tl.constexpr):
    """Codes of numbers; scales of 0 belong to numbers that are all equal."""
    steps = tl.math.div_rn(numbers - low, tl.where(scale == 0, 1.0, scale) + tl.zeros_like(numbers))
    return tl.minimum(tl.maximum(tl.floor(steps + 0.5), 0.0), (1 << BITS) - 1.0).to(tl.uint8)


@triton.jit
def _store_codes(ptr, codes, PAGE: tl.constexpr, BITS: tl.constexpr, SIZE: tl.constexpr, BLOCK_D: tl.constexpr):
    """Write the codes `[PAGE, BLOCK_D]` of one page and head."""
    WIDTH: tl.constexpr = SIZE * BITS // 8
    if BITS == 4:
        first, second = tl.split(tl.reshape(codes, (PAGE, BLOCK_D // 2, 2)))
        codes = first | (second << 4)
    ns, ds = tl.arange(0, PAGE), tl.arange(0, BLOCK_D * BITS // 8)
    tl.store(ptr + ns[:, None] * WIDTH + ds[None, :], codes, mask=(ds < WIDTH)[None, :] & (ns >= 0)[:, None])


@triton.jit
def _quantize(
    k_ptr,
    v_ptr,
    k_codes_ptr,
    k_scale_ptr,
    k_low_ptr,
    v_codes_ptr,
    v_scale_ptr,
    v_low_ptr,
    pages_ptr,
    k_page_stride,
    k_stride,
    k_head_stride,
    v_page_stride,
    v_stride,
    v_head_stride,
    heads,
    margin,
    BITS: tl.constexpr,
    SIZE: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Quantise one page of one head; grid (pages, heads)."""
    item, head = pages_ptr + 3 * tl.program_id(0), tl.program_id(1)
    source, target, count = tl.load(item).to(tl.int64), tl.load(item + 1).to(tl.int64), tl.load(item + 2)
    ns, ds = tl.arange(0, PAGE), tl.arange(0, BLOCK_D)
    exists = (ns < count)[:, None] & (ds < SIZE)[None, :]
    own = target * heads + head
    steps = (1 << BITS) - 1.0  # type: ignore[reportOperatorIssue]
    k_ptrs = k_ptr + source * k_page_stride + head.to(tl.int64) * k_head_stride
    k = tl.load(k_ptrs + ns.to(tl.int64)[:, None] * k_stride + ds[None, :], mask=exists, other=0).to(tl.float32)
    low = tl.where(ds < SIZE, tl.min(tl.where(exists, k, float("inf")), axis=0), 0.0)
    most = tl.where(ds < SIZE, tl.max(tl.where(exists, k, float("-inf")), axis=0), 0.0)
    scale = ((most - low) / steps * margin).to(k_scale_ptr.dtype.element_ty)
    tl.store(k_scale_ptr + own * SIZE + ds, scale, mask=ds < SIZE)
    tl.store(k_low_ptr + own * SIZE + ds, low.to(k_low_ptr.dtype.element_ty), mask=ds < SIZE)
    codes = _codes(k, scale.to(tl.float32)[None, :], low[None, :], BITS)
    # Tokens that do not exist have the code of whatever was loaded for them, which may not be 0.
    _store_codes(k_codes_ptr + own * (PAGE * SIZE * BITS // 8), tl.where(exists, codes, 0), PAGE, BITS, SIZE, BLOCK_D)
    v_ptrs = v_ptr + source * v_page_stride + head.to(tl.int64) * v_head_stride
    v = tl.load(v_ptrs + ns.to(tl.int64)[:, None] * v_stride + ds[None, :], mask=exists, other=0).to(tl.float32)
    low = tl.where(ns < count, tl.min(tl.where((ds < SIZE)[None, :], v, float("inf")), axis=1), 0.0)
    most = tl.where(ns < count, tl.max(tl.where((ds < SIZE)[None, :], v, float("-inf")), axis=1), 0.0)
    scale = ((most - low) / steps * margin).to(v_scale_ptr.dtype.element_ty)
    tl.store(v_scale_ptr + own * PAGE + ns, scale)
    tl.store(v_low_ptr + own * PAGE + ns, low.to(v_low_ptr.dtype.element_ty))
    codes = _codes(v, scale.to(tl.float32)[:, None], low[:, None], BITS)
    _store_codes(v_codes_ptr + own * (PAGE * SIZE * BITS // 8), tl.where(exists, codes, 0), PAGE, BITS, SIZE, BLOCK_D)
