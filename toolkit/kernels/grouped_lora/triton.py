"""The Triton kernels of grouped LoRA: inner products with A (shrink), then their products with B (expand).

`side_ptr` is the side of `PagedPairs.sides` that a kernel multiplies with, so the same kernels run backward with the
sides in turn. Nothing is loaded that does not exist: ranks, features and rows are masked, never padded. Inner products
are float32 in `[parts, size]`: the parts of K are added by those who read them, in the same order every time, so there
are no atomics and nothing has to be zeroed.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _offsets(offsets_ptr, first, ranks, count, pieces, column, PAGE: tl.constexpr):
    """Where the pieces of some rank rows are at `column`; the lists lie behind each other.

    Both products tell the compiler what offsets are divisible by, so that it loads 16 bytes at a time; a hint on a load
    and a remainder tell it nothing.
    """
    found = tl.load(offsets_ptr + first + ranks * pieces + column // PAGE, mask=ranks < count, other=0)
    return found.to(tl.int64) * 16 + (column - column // PAGE * PAGE)


@triton.jit
def _shrink_row(
    x_ptr,
    h_ptr,
    pool_ptr,
    offsets_ptr,
    side_ptr,
    scale_ptr,
    items_ptr,
    rows_ptr,
    places_ptr,
    x_stride,
    width,
    pieces,
    slots,
    size,
    PAGE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Multiply one row by BLOCK_R rank rows along BLOCK_K features; grid (items, parts)."""
    item, part = items_ptr + 3 * tl.program_id(0), tl.program_id(1)
    e, slot, first = tl.load(item), tl.load(item + 1), tl.load(item + 2)
    rank = tl.load(side_ptr + slots + slot)
    if first >= rank:
        return
    ranks = first + tl.arange(0, BLOCK_R)
    begins = _offsets(offsets_ptr, tl.load(side_ptr + slot), ranks, rank, pieces, part * BLOCK_K, PAGE)
    ks = tl.arange(0, BLOCK_K)
    exists = part * BLOCK_K + ks < width
    a = tl.load(pool_ptr + begins[:, None] + ks[None, :], mask=(ranks < rank)[:, None] & exists[None, :], other=0)
    row = tl.load(rows_ptr + e).to(tl.int64)
    x = tl.load(x_ptr + row * x_stride + part * BLOCK_K + ks, mask=exists, other=0)
    h = tl.sum(a.to(tl.float32) * x.to(tl.float32)[None, :], axis=1) * tl.load(scale_ptr + slot)
    place = part.to(tl.int64) * size + tl.load(places_ptr + e) + tl.load(side_ptr + 2 * slots + slot)
    tl.store(h_ptr + place + ranks, h, mask=ranks < rank)


@triton.jit
def _shrink_tile(
    x_ptr,
    h_ptr,
    pool_ptr,
    offsets_ptr,
    side_ptr,
    scale_ptr,
    items_ptr,
    rows_ptr,
    places_ptr,
    x_stride,
    width,
    pieces,
    slots,
    size,
    part_width,
    PAGE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Multiply BLOCK_M rows of one adapter by BLOCK_R rank rows along `part_width` features; grid (items, parts)."""
    item, part = items_ptr + 4 * tl.program_id(0), tl.program_id(1)
    e, count, slot, first = tl.load(item), tl.load(item + 1), tl.load(item + 2), tl.load(item + 3)
    rank = tl.load(side_ptr + slots + slot)
    if first >= rank:
        return
    lines = tl.arange(0, BLOCK_M)
    rows = tl.load(rows_ptr + e + lines, mask=lines < count, other=0).to(tl.int64)
    ranks = first + tl.arange(0, BLOCK_R)
    start = tl.load(side_ptr + slot)
    ks = tl.arange(0, BLOCK_K)
    h = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    stop = tl.minimum(part * part_width + part_width, width)
    # A part lies in one page or is whole pages. Inside, no load waits for another, so the loop is pipelined.
    for page in range(part * part_width, stop, PAGE):
        begins = _offsets(offsets_ptr, start, ranks, rank, pieces, page, PAGE)
        x_ptrs = x_ptr + rows[:, None] * x_stride + page + ks[None, :]
        a_ptrs = pool_ptr + begins[:, None] + ks[None, :]
        for k in range(0, tl.minimum(PAGE, stop - page), BLOCK_K):
            exists = (page + k + ks < width)[None, :]
            x = tl.load(x_ptrs + k, mask=(lines < count)[:, None] & exists, other=0)
            a = tl.load(a_ptrs + k, mask=(ranks < rank)[:, None] & exists, other=0)
            h = tl.dot(x, tl.trans(a), h, input_precision="ieee")
    places = tl.load(places_ptr + e + lines, mask=lines < count, other=0) + tl.load(side_ptr + 2 * slots + slot)
    h_ptrs = h_ptr + part.to(tl.int64) * size + places[:, None] + ranks[None, :]
    tl.store(h_ptrs, h * tl.load(scale_ptr + slot), mask=(lines < count)[:, None] & (ranks < rank)[None, :])


@triton.jit
def _shrink_token(
    tokens_ptr,
    h_ptr,
    pool_ptr,
    offsets_ptr,
    side_ptr,
    items_ptr,
    rows_ptr,
    places_ptr,
    token_stride,
    pieces,
    slots,
    PAGE: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Take one token's column of A instead of a product: an embedding; grid (items,)."""
    item = items_ptr + 3 * tl.program_id(0)
    e, slot, first = tl.load(item), tl.load(item + 1), tl.load(item + 2)
    rank = tl.load(side_ptr + slots + slot)
    ranks = first + tl.arange(0, BLOCK_R)
    token = tl.load(tokens_ptr + tl.load(rows_ptr + e).to(tl.int64) * token_stride)
    begins = _offsets(offsets_ptr, tl.load(side_ptr + slot), ranks, rank, pieces, token, PAGE)
    a = tl.load(pool_ptr + begins, mask=ranks < rank, other=0)
    tl.store(h_ptr + tl.load(places_ptr + e) + ranks, a.to(tl.float32), mask=ranks < rank)


@triton.jit
def _linear_of(block, width0, width1, width2, BLOCK_N: tl.constexpr):
    """Which linear a block of outputs belongs to, that linear's outputs, and the first of the block."""
    blocks0, blocks1 = tl.cdiv(width0, BLOCK_N), tl.cdiv(width1, BLOCK_N)
    linear = (block >= blocks0).to(tl.int32) + (block >= blocks0 + blocks1).to(tl.int32)
    width = tl.where(linear == 0, width0, tl.where(linear == 1, width1, width2))
    before = tl.where(linear == 0, 0, tl.where(linear == 1, blocks0, blocks0 + blocks1))
    return linear, width, (block - before) * BLOCK_N


@triton.jit
def _choose(linear, first, second, third):
    """The one that belongs to a linear."""
    return tl.where(linear == 0, first, tl.where(linear == 1, second, third))


@triton.jit
def _own_bias(extra_ptr, slot, offsets_ptr, pool_ptr, n, ns, width, PAGE: tl.constexpr):
    """An adapter's bias at some outputs, 0 if it has none."""
    start = tl.load(extra_ptr + slot)
    begin = tl.load(offsets_ptr + start + n // PAGE, mask=start >= 0, other=0).to(tl.int64) * 16
    exists = n + ns < tl.where(start >= 0, width, 0)
    return tl.load(pool_ptr + begin + (n - n // PAGE * PAGE) + ns, mask=exists, other=0).to(tl.float32)


@triton.jit
def _gain_and_bias(extra_ptr, slot, offsets_ptr, pool_ptr, bias_ptr, has_bias, n, ns, width, PAGE: tl.constexpr):
    """A DoRA's gain at some outputs and the linear's bias, which it must leave alone; 1 and 0 for a LoRA."""
    start = tl.load(extra_ptr + slot)
    begin = tl.load(offsets_ptr + start + n // PAGE, mask=start >= 0, other=0).to(tl.int64) * 16
    exists = n + ns < tl.where(start >= 0, width, 0)
    gain = tl.load(pool_ptr + begin + (n - n // PAGE * PAGE) + ns, mask=exists, other=0).to(tl.float32)
    has = exists & (n + ns < tl.where(has_bias, width, 0))
    return tl.where(exists, gain, 1.0), tl.load(bias_ptr + n + ns, mask=has, other=0).to(tl.float32)


@triton.jit
def _expand_row(
    y0_ptr,
    y1_ptr,
    y2_ptr,
    bias0_ptr,
    bias1_ptr,
    bias2_ptr,
    h_ptr,
    pool_ptr,
    offsets_ptr,
    sides_ptr,
    scales_ptr,
    extras_ptr,
    items_ptr,
    rows_ptr,
    weights_ptr,
    places_ptr,
    single_ptr,
    y0_stride,
    y1_stride,
    y2_stride,
    width0,
    width1,
    width2,
    weights_stride,
    slots,
    size,
    row_parts,
    tile_parts,
    biases,
    PAGE: tl.constexpr,
    EXTRAS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Add one adapter's change to BLOCK_N outputs of one row; grid (items, blocks of all linears)."""
    item = items_ptr + 2 * tl.program_id(0)
    block = tl.program_id(1)
    linear, width, n = _linear_of(block, width0, width1, width2, BLOCK_N)  # type: ignore[reportGeneralTypeIssues]
    e, slot = tl.load(item), tl.load(item + 1)
    side_ptr = sides_ptr + linear * 3 * slots
    start, rank = tl.load(side_ptr + slot), tl.load(side_ptr + slots + slot)
    if (rank == 0) | (e < 0):  # lists of a fixed size end with work that is none
        return
    ns = tl.arange(0, BLOCK_N)
    exists = n + ns < width
    pieces = tl.cdiv(width, PAGE)
    place = tl.load(places_ptr + e) + tl.load(side_ptr + 2 * slots + slot)
    parts = tl.where(tl.load(single_ptr + e) == 1, row_parts, tile_parts)
    change = tl.zeros((BLOCK_N,), tl.float32)
    for first in range(0, rank, BLOCK_R):
        ranks = first + tl.arange(0, BLOCK_R)
        begins = _offsets(offsets_ptr, start, ranks, rank, pieces, n, PAGE)
        b = tl.load(pool_ptr + begins[:, None] + ns[None, :], mask=(ranks < rank)[:, None] & exists[None, :], other=0)
        h = tl.zeros((BLOCK_R,), tl.float32)
        for part in range(parts):
            h += tl.load(h_ptr + tl.cast(part, tl.int64) * size + place + ranks, mask=ranks < rank, other=0)
        change += tl.sum(b.to(tl.float32) * h[:, None], axis=0)
    scale = tl.load(weights_ptr + linear * weights_stride + e) * tl.load(scales_ptr + linear * slots + slot)
    y_ptr = _choose(linear, y0_ptr, y1_ptr, y2_ptr)
    y_ptr += tl.load(rows_ptr + e).to(tl.int64) * _choose(linear, y0_stride, y1_stride, y2_stride) + n
    y = tl.load(y_ptr + ns, mask=exists, other=0).to(tl.float32)
    if EXTRAS:
        extra_ptr = extras_ptr + linear * 2 * slots
        own = _own_bias(extra_ptr, slot, offsets_ptr, pool_ptr, n, ns, width, PAGE)
        bias_ptr, has_bias = _choose(linear, bias0_ptr, bias1_ptr, bias2_ptr), (biases >> linear) % 2 == 1
        gain, bias = _gain_and_bias(
            extra_ptr + slots, slot, offsets_ptr, pool_ptr, bias_ptr, has_bias, n, ns, width, PAGE
        )
        y = gain * (y - bias + scale * (change + own)) + bias
    else:
        y += scale * change
    tl.store(y_ptr + ns, y.to(y_ptr.dtype.element_ty), mask=exists)


@triton.jit
def _inner(h_ptr, places, ranks, rank, has, parts, most_parts, size):
    """The inner products of some assignments with some rank rows, their parts added up."""
    h = tl.zeros((has.shape[0], ranks.shape[0]), tl.float32)
    exists = (ranks < rank)[None, :]
    for part in range(most_parts):
        h_ptrs = h_ptr + tl.cast(part, tl.int64) * size + places[:, None] + ranks[None, :]
        h += tl.load(h_ptrs, mask=(has & (part < parts))[:, None] & exists, other=0)
    return h


@triton.jit
def _expand_tile(
    y0_ptr,
    y1_ptr,
    y2_ptr,
    bias0_ptr,
    bias1_ptr,
    bias2_ptr,
    h_ptr,
    pool_ptr,
    offsets_ptr,
    sides_ptr,
    scales_ptr,
    extras_ptr,
    bounds_ptr,
    tile_rows_ptr,
    entries_ptr,
    weights_ptr,
    places_ptr,
    single_ptr,
    y0_stride,
    y1_stride,
    y2_stride,
    width0,
    width1,
    width2,
    weights_stride,
    slots,
    size,
    row_parts,
    tile_parts,
    biases,
    PAGE: tl.constexpr,
    EXTRAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Add the changes of all adapters of BLOCK_M rows to BLOCK_N outputs; grid (tiles, blocks of all linears)."""
    tile = tl.program_id(0)
    block = tl.program_id(1)
    linear, width, n = _linear_of(block, width0, width1, width2, BLOCK_N)  # type: ignore[reportGeneralTypeIssues]
    side_ptr = sides_ptr + linear * 3 * slots
    lines, ns = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    exists = n + ns < width
    pieces = tl.cdiv(width, PAGE)
    change = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    changed = lines < 0
    extra_ptr = extras_ptr + linear * 2 * slots
    begin, stop = tl.load(bounds_ptr + tile), tl.load(bounds_ptr + tile + 1)
    if begin == stop:
        return
    for entry in range(begin, stop):
        slot = tl.load(entries_ptr + entry * (1 + BLOCK_M))
        e = tl.load(entries_ptr + entry * (1 + BLOCK_M) + 1 + lines)
        start, rank = tl.load(side_ptr + slot), tl.load(side_ptr + slots + slot)
        has = (e >= 0) & (lines < tl.where(rank > 0, BLOCK_M, 0))
        changed |= has
        places = tl.load(places_ptr + e, mask=has, other=0) + tl.load(side_ptr + 2 * slots + slot)
        parts = tl.where(tl.load(single_ptr + e, mask=has, other=0) == 1, row_parts, tile_parts)
        own = tl.load(weights_ptr + linear * weights_stride + e, mask=has, other=0)
        scale = own * tl.load(scales_ptr + linear * slots + slot)
        for first in range(0, rank, BLOCK_R):
            ranks = first + tl.arange(0, BLOCK_R)
            begins = _offsets(offsets_ptr, start, ranks, rank, pieces, n, PAGE)
            b_mask = (ranks < rank)[:, None] & exists[None, :]
            b = tl.load(pool_ptr + begins[:, None] + ns[None, :], mask=b_mask, other=0)
            h = _inner(h_ptr, places, ranks, rank, has, parts, tl.maximum(row_parts, tile_parts), size)
            change = tl.dot((h * scale[:, None]).to(b.dtype), b, change, input_precision="ieee")
        if EXTRAS:
            own = _own_bias(extra_ptr, slot, offsets_ptr, pool_ptr, n, ns, width, PAGE)
            change += scale[:, None] * own[None, :]
    rows = tl.load(tile_rows_ptr + tile * BLOCK_M + lines).to(tl.int64)
    y_ptr = _choose(linear, y0_ptr, y1_ptr, y2_ptr)
    y_ptrs = y_ptr + rows[:, None] * _choose(linear, y0_stride, y1_stride, y2_stride) + n + ns[None, :]
    mask = changed[:, None] & exists[None, :]
    y = tl.load(y_ptrs, mask=mask, other=0).to(tl.float32)
    if EXTRAS:
        # A tile with a gain has no other adapter, so the last one's is the tile's.
        slot = tl.load(entries_ptr + (stop - 1) * (1 + BLOCK_M))
        bias_ptr, has_bias = _choose(linear, bias0_ptr, bias1_ptr, bias2_ptr), (biases >> linear) % 2 == 1
        gain, bias = _gain_and_bias(
            extra_ptr + slots, slot, offsets_ptr, pool_ptr, bias_ptr, has_bias, n, ns, width, PAGE
        )
        y = gain[None, :] * (y - bias[None, :] + change) + bias[None, :]
    else:
        y += change
    tl.store(y_ptrs, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _outer(
    values_ptr,
    h_ptr,
    grad_ptr,
    offsets_ptr,
    side_ptr,
    scale_ptr,
    groups_ptr,
    rows_ptr,
    weights_ptr,
    places_ptr,
    single_ptr,
    stride,
    width,
    slots,
    size,
    row_parts,
    tile_parts,
    PAGE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Add up inner products times values over an adapter's rows: the gradient of a factor, in its factor's place.

    Grid (adapters, blocks of the largest rank, blocks of features).
    """
    group = groups_ptr + 3 * tl.program_id(0)
    e, count, slot = tl.load(group), tl.load(group + 1), tl.load(group + 2)
    rank = tl.load(side_ptr + slots + slot)
    first, n = tl.program_id(1) * BLOCK_R, tl.program_id(2) * BLOCK_N
    if first >= rank:
        return
    ranks, ns = first + tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_N)
    exists = n + ns < width
    grad = tl.zeros((BLOCK_R, BLOCK_N), tl.float32)
    for start in range(0, count, BLOCK_M):
        lines = start + tl.arange(0, BLOCK_M)
        has = lines < count
        rows = tl.load(rows_ptr + e + lines, mask=has, other=0).to(tl.int64)
        places = tl.load(places_ptr + e + lines, mask=has, other=0) + tl.load(side_ptr + 2 * slots + slot)
        parts = tl.where(tl.load(single_ptr + e + lines, mask=has, other=0) == 1, row_parts, tile_parts)
        h = _inner(h_ptr, places, ranks, rank, has, parts, tl.maximum(row_parts, tile_parts), size)
        h *= tl.load(weights_ptr + e + lines, mask=has, other=0)[:, None]
        values_ptrs = values_ptr + rows[:, None] * stride + n + ns[None, :]
        values = tl.load(values_ptrs, mask=has[:, None] & exists[None, :], other=0)
        grad = tl.dot(tl.trans(h.to(values.dtype)), values, grad, input_precision="ieee")
    begins = _offsets(offsets_ptr, tl.load(side_ptr + slot), ranks, rank, tl.cdiv(width, PAGE), n, PAGE)
    grad *= tl.load(scale_ptr + slot)
    mask = (ranks < rank)[:, None] & exists[None, :]
    tl.store(grad_ptr + begins[:, None] + ns[None, :], grad.to(grad_ptr.dtype.element_ty), mask=mask)
