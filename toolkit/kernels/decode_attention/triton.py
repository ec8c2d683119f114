"""The Triton kernel of decode attention: each program works through its pieces of all spans; see `plan.py`.

The query heads of a key/value head, of all members of a span, are rows beside each other, so keys are read once.
"""

from __future__ import annotations

import triton
import triton.language as tl

from toolkit.kernels.merge_states.triton import LOG2E, absorb, capped, finish


@triton.jit
def _load_numbers(
    ptr, tables_ptr, ns, exists, page_stride, stride, PAGE: tl.constexpr, SIZE: tl.constexpr, BLOCK_D: tl.constexpr
):
    """Keys or values of some tokens of one head, `[N, D]`."""
    ds = tl.arange(0, BLOCK_D)
    pages = tl.load(tables_ptr + ns // PAGE, mask=exists, other=0).to(tl.int64)
    offsets = pages * page_stride + (ns % PAGE).to(tl.int64) * stride
    return tl.load(ptr + offsets[:, None] + ds[None, :], mask=exists[:, None] & (ds < SIZE)[None, :], other=0)


@triton.jit
def _load_codes(ptr, n, exists, PAGE: tl.constexpr, BITS: tl.constexpr, SIZE: tl.constexpr, BLOCK_D: tl.constexpr):
    """Codes of the tokens of one page from its `n`-th on, float32 `[N, D]`."""
    WIDTH: tl.constexpr = SIZE * BITS // 8
    ns, ds = tl.arange(0, exists.shape[0]), tl.arange(0, BLOCK_D * BITS // 8)
    mask = exists[:, None] & (ds < WIDTH)[None, :]
    codes = tl.load(ptr + n * WIDTH + ns[:, None] * WIDTH + ds[None, :], mask=mask, other=0)
    if BITS == 4:
        codes = tl.interleave(codes & 15, codes >> 4)
    return codes.to(tl.float32)


@triton.jit
def _attend(
    q_ptr,
    k_ptr,
    v_ptr,
    k_scale_ptr,
    k_low_ptr,
    v_scale_ptr,
    v_low_ptr,
    tables_ptr,
    members_ptr,
    bounds_ptr,
    pieces_ptr,
    out_ptr,
    lse_ptr,
    q_stride,
    q_head_stride,
    k_page_stride,
    k_stride,
    k_head_stride,
    v_page_stride,
    v_stride,
    v_head_stride,
    table_stride,
    heads,
    scale,
    soft_cap,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    SIZE: tl.constexpr,
    PAGE: tl.constexpr,
    CAPPED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Work through the pieces of one program; BITS of 0 are keys and values in full precision; grid (programs,)."""
    ms, ds = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    program = tl.program_id(0)
    for piece in range(tl.load(bounds_ptr + program), tl.load(bounds_ptr + program + 1)):
        own = pieces_ptr + 7 * piece
        first, count, table = tl.load(own), tl.load(own + 1), tl.load(own + 2).to(tl.int64)
        head, start, stop = tl.load(own + 3), tl.load(own + 4), tl.load(own + 5)
        rows = ms < count * GROUP
        member = tl.load(members_ptr + first + ms // GROUP, mask=rows, other=0).to(tl.int64)
        q_ptrs = q_ptr + member * q_stride + (head * GROUP + ms % GROUP).to(tl.int64) * q_head_stride
        q = tl.load(q_ptrs[:, None] + ds[None, :], mask=rows[:, None] & (ds < SIZE)[None, :], other=0)
        most, total = tl.full((BLOCK_M,), float("-inf"), tl.float32), tl.zeros((BLOCK_M,), tl.float32)
        out = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
        own_table = tables_ptr + table * table_stride
        for n in range(start // BLOCK_N * BLOCK_N, stop, BLOCK_N):
            ns = n + tl.arange(0, BLOCK_N)
            exists = (ns >= start) & (ns < stop)
            if BITS == 0:
                k_from = k_ptr + head.to(tl.int64) * k_head_stride
                v_from = v_ptr + head.to(tl.int64) * v_head_stride
                k = _load_numbers(k_from, own_table, ns, exists, k_page_stride, k_stride, PAGE, SIZE, BLOCK_D)
                v = _load_numbers(v_from, own_table, ns, exists, v_page_stride, v_stride, PAGE, SIZE, BLOCK_D)
            else:
                # A tile lies in one page, whose keys have one scale per channel.
                page = tl.load(own_table + n // PAGE).to(tl.int64) * heads + head
                code = page * (PAGE * SIZE * BITS // 8)
                k = _load_codes(k_ptr + code, n % PAGE, exists, PAGE, BITS, SIZE, BLOCK_D)
                k *= tl.load(k_scale_ptr + page * SIZE + ds, mask=ds < SIZE, other=0).to(tl.float32)[None, :]
                k += tl.load(k_low_ptr + page * SIZE + ds, mask=ds < SIZE, other=0).to(tl.float32)[None, :]
                v = _load_codes(v_ptr + code, n % PAGE, exists, PAGE, BITS, SIZE, BLOCK_D)
                v *= tl.load(v_scale_ptr + page * PAGE + ns % PAGE, mask=exists, other=0).to(tl.float32)[:, None]
                v += tl.load(v_low_ptr + page * PAGE + ns % PAGE, mask=exists, other=0).to(tl.float32)[:, None]
                k, v = k.to(q.dtype), v.to(q.dtype)
            scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
            if CAPPED:
                scores = capped(scores, soft_cap)
            scores = tl.where(exists[None, :], scores * LOG2E, float("-inf"))
            most, total, out = absorb(scores, v, most, total, out)
        out, lse = finish(most, total, out)
        place = tl.load(own + 6).to(tl.int64) + ms
        tl.store(out_ptr + place[:, None] * SIZE + ds[None, :], out, mask=rows[:, None] & (ds < SIZE)[None, :])
        tl.store(lse_ptr + place, lse, mask=rows)
