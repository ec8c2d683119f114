"""The Triton kernels of FlashAttention-2 (Dao 2023, arXiv:2307.08691) over a flat batch of sequences.

The query heads of a key/value head are rows beside each other: row `m` of a sequence is token `m // GROUP`, head
`m % GROUP`, so keys are read once per group and gradients of keys are sums over it. Keys lie in pages, or one after
another where `PAGE` is 0. Tiles that no row sees are not visited, and those that all rows see are not masked.

An item is six numbers: first query token, rows, position of the first query, number of keys, block table or first key,
and the first row, or the first key, that a program works on.
"""

from __future__ import annotations

import triton
import triton.language as tl

from toolkit.kernels.merge_states.triton import LOG2E, absorb, capped, finish


@triton.jit
def _item(items_ptr):
    """The numbers of an item."""
    item = items_ptr + 6 * tl.program_id(0)
    first, rows, position = tl.load(item), tl.load(item + 1), tl.load(item + 2)
    return first.to(tl.int64), rows, position, tl.load(item + 3), tl.load(item + 4), tl.load(item + 5)


@triton.jit
def _load_keys(
    ptr,
    table_ptr,
    ns,
    length,
    page_stride,
    stride,
    PAGE: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Some keys or values of one head and sequence, `[N, D]`; unless masked, all exist."""
    ds = tl.arange(0, BLOCK_D)
    exists = ns < length
    if PAGE > 0:
        pages = tl.load(table_ptr + ns // PAGE, mask=exists, other=0)
        offsets = pages.to(tl.int64) * page_stride + (ns % PAGE).to(tl.int64) * stride
    else:
        offsets = ns.to(tl.int64) * stride
    ptrs = ptr + offsets[:, None] + ds[None, :]
    if MASKED:
        return tl.load(ptrs, mask=exists[:, None] & (ds < SIZE)[None, :], other=0)
    elif BLOCK_D == SIZE:
        return tl.load(ptrs)
    else:
        return tl.load(ptrs, mask=(ds < SIZE)[None, :], other=0)


@triton.jit
def _scores(q, k, scale, soft_cap, CAPPED: tl.constexpr):
    """Scores of rows and keys, natural."""
    scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
    if CAPPED:
        scores = capped(scores, soft_cap)
    return scores


@triton.jit
def _seen(positions, ns, length, window, num_global):
    """Which keys the rows see."""
    near = (ns[None, :] > positions[:, None] - window) | (ns < num_global)[None, :]
    return (ns[None, :] <= positions[:, None]) & near & (ns < length)[None, :]


@triton.jit
def _tiles(first, last, length, window, num_global, BLOCK_N: tl.constexpr):
    """Which tiles of keys the rows at positions `first` to `last` visit.

    Returns:
        Tiles of global tokens before the window's, the window's first and stop, and first and stop of those in between
        that every row sees whole; the latter two are equal where there are none.
    """
    stop = tl.cdiv(tl.maximum(tl.minimum(length, last + 1), 0), BLOCK_N)
    start = tl.minimum(tl.maximum(first - window + 1, 0) // BLOCK_N, stop)
    whole = tl.cdiv(tl.maximum(last - window + 1, 0), BLOCK_N)
    whole_stop = tl.maximum(tl.minimum(length, first + 1), 0) // BLOCK_N
    whole = tl.minimum(whole, whole_stop)
    return tl.cdiv(tl.minimum(num_global, start * BLOCK_N), BLOCK_N), start, stop, whole, whole_stop


@triton.jit
def _tile(i, num_global_tiles, start, whole, whole_stop):
    """The `i`-th of the tiles that have to be masked."""
    tile = tl.where(i < num_global_tiles, i, i - num_global_tiles + start)
    return tl.where((i >= num_global_tiles) & (tile >= whole), tile + whole_stop - whole, tile)


@triton.jit
def _forward(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,
    sinks_ptr,
    tables_ptr,
    items_ptr,
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
    window,
    num_global,
    GROUP: tl.constexpr,
    SIZE: tl.constexpr,
    PAGE: tl.constexpr,
    CAPPED: tl.constexpr,
    SINKS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Attend from BLOCK_M rows to the keys of one head, BLOCK_N at a time; grid (items, key/value heads)."""
    first, rows, position, length, place, row = _item(items_ptr)  # type: ignore[reportGeneralTypeIssues]
    head = tl.program_id(1)
    ms, ds = row + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    tokens, own = first + ms // GROUP, head * GROUP + ms % GROUP
    exists = (ms < rows)[:, None] & (ds < SIZE)[None, :]
    q_ptrs = q_ptr + (tokens * q_stride + own.to(tl.int64) * q_head_stride)[:, None] + ds[None, :]
    q = tl.load(q_ptrs, mask=exists, other=0)
    positions = position + ms // GROUP
    low, high = position + row // GROUP, position + (tl.minimum(row + BLOCK_M, rows) - 1) // GROUP
    global_tiles, start, stop, whole, whole_stop = _tiles(low, high, length, window, num_global, BLOCK_N)
    k_ptr += head.to(tl.int64) * k_head_stride
    v_ptr += head.to(tl.int64) * v_head_stride
    if PAGE > 0:
        tables_ptr += place.to(tl.int64) * table_stride
    else:
        k_ptr += place.to(tl.int64) * k_stride
        v_ptr += place.to(tl.int64) * v_stride
    most, total = tl.full((BLOCK_M,), float("-inf"), tl.float32), tl.zeros((BLOCK_M,), tl.float32)
    if SINKS:
        most = tl.load(sinks_ptr + own, mask=ms < rows, other=0).to(tl.float32) * LOG2E
        total += 1
    out = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for tile in range(whole, whole_stop):
        ns = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        k = _load_keys(k_ptr, tables_ptr, ns, length, k_page_stride, k_stride, PAGE, SIZE, BLOCK_D, False)
        v = _load_keys(v_ptr, tables_ptr, ns, length, v_page_stride, v_stride, PAGE, SIZE, BLOCK_D, False)
        most, total, out = absorb(_scores(q, k, scale, soft_cap, CAPPED) * LOG2E, v, most, total, out)
    for i in range(global_tiles + stop - start - (whole_stop - whole)):
        ns = _tile(i, global_tiles, start, whole, whole_stop) * BLOCK_N + tl.arange(0, BLOCK_N)
        k = _load_keys(k_ptr, tables_ptr, ns, length, k_page_stride, k_stride, PAGE, SIZE, BLOCK_D, True)
        v = _load_keys(v_ptr, tables_ptr, ns, length, v_page_stride, v_stride, PAGE, SIZE, BLOCK_D, True)
        seen = _seen(positions, ns, length, window, num_global)
        scores = tl.where(seen, _scores(q, k, scale, soft_cap, CAPPED) * LOG2E, float("-inf"))
        most, total, out = absorb(scores, v, most, total, out)
    out, lse = finish(most, total, out)
    out_ptrs = out_ptr + (tokens * heads + own)[:, None] * SIZE + ds[None, :]
    tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask=exists)
    tl.store(lse_ptr + tokens * heads + own, lse, mask=ms < rows)


@triton.jit
def _rows_of(
    q_ptr, dout_ptr, lse_ptr, delta_ptr, first, ms, rows, head, q_stride, q_head_stride, heads, GROUP: tl.constexpr,
    SIZE: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Queries, gradients of outputs, logarithms of sums to the base 2, and what gradients of shares are less by."""
    ds = tl.arange(0, BLOCK_D)
    tokens, own = first + ms // GROUP, head * GROUP + ms % GROUP
    exists = (ms < rows)[:, None] & (ds < SIZE)[None, :]
    q_ptrs = q_ptr + (tokens * q_stride + own.to(tl.int64) * q_head_stride)[:, None] + ds[None, :]
    dout_ptrs = dout_ptr + (tokens * heads + own)[:, None] * SIZE + ds[None, :]
    lse = tl.load(lse_ptr + tokens * heads + own, mask=ms < rows, other=0) * LOG2E
    delta = tl.load(delta_ptr + tokens * heads + own, mask=ms < rows, other=0)
    return tl.load(q_ptrs, mask=exists, other=0), tl.load(dout_ptrs, mask=exists, other=0), lse, delta


@triton.jit
def _grad_scores(q, k, v, dout, lse, delta, seen, scale, soft_cap, CAPPED: tl.constexpr):
    """The shares of some rows and keys, recomputed, and the gradient of their products."""
    scores = _scores(q, k, scale, soft_cap, CAPPED)
    shares = tl.where(seen, tl.exp2(scores * LOG2E - lse[:, None]), 0.0)
    grad = shares * (tl.dot(dout, tl.trans(v), input_precision="ieee") - delta[:, None]) * scale
    if CAPPED:
        grad *= 1 - (scores / soft_cap) * (scores / soft_cap)
    return shares, grad


@triton.jit
def _grad_queries(
    q_ptr,
    k_ptr,
    v_ptr,
    dout_ptr,
    lse_ptr,
    delta_ptr,
    dq_ptr,
    items_ptr,
    q_stride,
    q_head_stride,
    k_stride,
    k_head_stride,
    v_stride,
    v_head_stride,
    heads,
    scale,
    soft_cap,
    window,
    num_global,
    GROUP: tl.constexpr,
    SIZE: tl.constexpr,
    CAPPED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Gradient of BLOCK_M rows of queries; grid (items, key/value heads)."""
    first, rows, position, length, place, row = _item(items_ptr)  # type: ignore[reportGeneralTypeIssues]
    head = tl.program_id(1)
    ms, ds = row + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    q, dout, lse, delta = _rows_of(
        q_ptr, dout_ptr, lse_ptr, delta_ptr, first, ms, rows, head, q_stride, q_head_stride, heads, GROUP, SIZE, BLOCK_D
    )
    low, high = position + row // GROUP, position + (tl.minimum(row + BLOCK_M, rows) - 1) // GROUP
    global_tiles, start, stop, _whole, whole_stop = _tiles(low, high, length, window, num_global, BLOCK_N)
    k_ptr += head.to(tl.int64) * k_head_stride + place.to(tl.int64) * k_stride
    v_ptr += head.to(tl.int64) * v_head_stride + place.to(tl.int64) * v_stride
    dq = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for i in range(global_tiles + stop - start):
        ns = _tile(i, global_tiles, start, whole_stop, whole_stop) * BLOCK_N + tl.arange(0, BLOCK_N)
        k = _load_keys(k_ptr, k_ptr, ns, length, 0, k_stride, 0, SIZE, BLOCK_D, True)
        v = _load_keys(v_ptr, v_ptr, ns, length, 0, v_stride, 0, SIZE, BLOCK_D, True)
        seen = _seen(position + ms // GROUP, ns, length, window, num_global) & (ms < rows)[:, None]
        _shares, grad = _grad_scores(q, k, v, dout, lse, delta, seen, scale, soft_cap, CAPPED)
        dq = tl.dot(grad.to(k.dtype), k, dq, input_precision="ieee")
    tokens, own = first + ms // GROUP, head * GROUP + ms % GROUP
    dq_ptrs = dq_ptr + (tokens * heads + own)[:, None] * SIZE + ds[None, :]
    tl.store(dq_ptrs, dq.to(dq_ptr.dtype.element_ty), mask=(ms < rows)[:, None] & (ds < SIZE)[None, :])


@triton.jit
def _grad_keys(
    q_ptr,
    k_ptr,
    v_ptr,
    dout_ptr,
    lse_ptr,
    delta_ptr,
    dk_ptr,
    dv_ptr,
    items_ptr,
    q_stride,
    q_head_stride,
    k_stride,
    k_head_stride,
    v_stride,
    v_head_stride,
    heads,
    scale,
    soft_cap,
    window,
    num_global,
    GROUP: tl.constexpr,
    SIZE: tl.constexpr,
    CAPPED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Gradients of BLOCK_N keys and values, added up over their group of query heads; grid (items, heads)."""
    first, rows, position, length, place, key = _item(items_ptr)  # type: ignore[reportGeneralTypeIssues]
    head = tl.program_id(1)
    ns, ds = key + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    k_ptr += head.to(tl.int64) * k_head_stride + place.to(tl.int64) * k_stride
    v_ptr += head.to(tl.int64) * v_head_stride + place.to(tl.int64) * v_stride
    k = _load_keys(k_ptr, k_ptr, ns, length, 0, k_stride, 0, SIZE, BLOCK_D, True)
    v = _load_keys(v_ptr, v_ptr, ns, length, 0, v_stride, 0, SIZE, BLOCK_D, True)
    dk, dv = tl.zeros((BLOCK_N, BLOCK_D), tl.float32), tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    low = tl.maximum(key - position, 0) * GROUP // BLOCK_M * BLOCK_M
    # The last key of the block is seen for as long as a window reaches, the global ones for ever.
    high = tl.minimum(rows // GROUP, tl.maximum(key + BLOCK_N - 1 + window - position, 0)) * GROUP
    for row in range(low, tl.where(key < num_global, rows, high), BLOCK_M):
        ms = row + tl.arange(0, BLOCK_M)
        q, dout, lse, delta = _rows_of(  # type: ignore[reportGeneralTypeIssues]
            q_ptr, dout_ptr, lse_ptr, delta_ptr, first, ms, rows, head, q_stride, q_head_stride, heads, GROUP, SIZE,
            BLOCK_D,
        )  # fmt: skip
        seen = _seen(position + ms // GROUP, ns, length, window, num_global) & (ms < rows)[:, None]
        shares, grad = _grad_scores(q, k, v, dout, lse, delta, seen, scale, soft_cap, CAPPED)
        dv = tl.dot(tl.trans(shares.to(dout.dtype)), dout, dv, input_precision="ieee")
        dk = tl.dot(tl.trans(grad.to(q.dtype)), q, dk, input_precision="ieee")
    places = ((place + ns).to(tl.int64) * (heads // GROUP) + head)[:, None] * SIZE + ds[None, :]
    exists = (ns < length)[:, None] & (ds < SIZE)[None, :]
    tl.store(dk_ptr + places, dk.to(dk_ptr.dtype.element_ty), mask=exists)
    tl.store(dv_ptr + places, dv.to(dv_ptr.dtype.element_ty), mask=exists)
