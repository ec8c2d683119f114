"""The Triton kernels of `delta_linear`: a product with weights that are made of bits on the way to the tensor cores."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _change(
    bits_ptr, vector_ptr, ns, has, k, width, row_bytes, vector_stride, dtype, MASK: tl.constexpr, K: tl.constexpr
):
    """What the bits of some outputs and K features stand for, `[N, K]`; each byte is loaded once."""
    places = k // 8 + tl.arange(0, K // 8)
    exists = has[:, None] & (places < row_bytes)[None, :]
    packed = tl.load(bits_ptr + ns.to(tl.int64)[:, None] * row_bytes + places[None, :], mask=exists, other=0)
    bits = (packed.to(tl.int32)[:, :, None] >> tl.arange(0, 8)[None, None, :]) & 1
    bits = tl.reshape(bits, (ns.shape[0], K))
    if MASK:
        ks = k + tl.arange(0, K)
        vector_ptrs = vector_ptr + ns.to(tl.int64)[:, None] * vector_stride + ks[None, :]
        vector = tl.load(vector_ptrs, mask=has[:, None] & (ks < width)[None, :], other=0).to(dtype)
        return tl.where(bits != 0, vector, tl.zeros_like(vector))
    return (2 * bits - 1).to(dtype)


@triton.jit
def _multiply(
    y_ptr,
    x_ptr,
    parts_ptr,
    bits_ptr,
    scale_ptr,
    vector_ptr,
    items_ptr,
    rows_ptr,
    y_stride,
    x_stride,
    vector_stride,
    scale_stride,
    scale_step,
    width,
    row_bytes,
    outputs,
    assignments,
    part_width,
    MASK: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Multiply BLOCK_M rows of one fine-tune with BLOCK_N outputs along `part_width` features.

    Grid (items, blocks of outputs, parts): fine-tunes that read the same part of the vector run side by side. A program
    that has all features (WHOLE) adds to the outputs; others leave their part to `_add`.
    """
    item, n, part = items_ptr + 3 * tl.program_id(0), tl.program_id(1) * BLOCK_N, tl.program_id(2)
    first, count, task = tl.load(item), tl.load(item + 1), tl.load(item + 2)
    lines, ns = tl.arange(0, BLOCK_M), n + tl.arange(0, BLOCK_N)
    live, has = lines < count, ns < outputs
    rows = tl.load(rows_ptr + first + lines, mask=live, other=0).to(tl.int64)
    bits_ptr += task.to(tl.int64) * outputs * row_bytes
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    ks = tl.arange(0, BLOCK_K)
    for k in range(part * part_width, tl.minimum(part * part_width + part_width, width), BLOCK_K):
        exists = live[:, None] & (k + ks < width)[None, :]
        x = tl.load(x_ptr + rows[:, None] * x_stride + k + ks[None, :], mask=exists, other=0)
        change = _change(bits_ptr, vector_ptr, ns, has, k, width, row_bytes, vector_stride, x.dtype, MASK, BLOCK_K)
        total = tl.dot(x, tl.trans(change), total, input_precision="ieee")
    mask = live[:, None] & has[None, :]
    if WHOLE:
        scale = tl.load(scale_ptr + task.to(tl.int64) * scale_stride + ns * scale_step, mask=has, other=0)
        y_ptrs = y_ptr + rows[:, None] * y_stride + ns[None, :]
        y = tl.load(y_ptrs, mask=mask, other=0).to(tl.float32) + total * scale[None, :]
        tl.store(y_ptrs, y.to(y_ptr.dtype.element_ty), mask=mask)
    else:
        part_ptrs = parts_ptr + (part.to(tl.int64) * assignments + first + lines)[:, None] * outputs + ns[None, :]
        tl.store(part_ptrs, total, mask=mask)


@triton.jit
def _add(
    y_ptr,
    parts_ptr,
    scale_ptr,
    rows_ptr,
    tasks_ptr,
    y_stride,
    scale_stride,
    scale_step,
    outputs,
    assignments,
    parts,
    BLOCK_N: tl.constexpr,
):
    """Add the parts of BLOCK_N outputs of one row, in order; grid (assignments, blocks of outputs)."""
    e, ns = tl.program_id(0), tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    has = ns < outputs
    total = tl.zeros((BLOCK_N,), tl.float32)
    for part in range(parts):
        place = (tl.cast(part, tl.int64) * assignments + e) * outputs
        total += tl.load(parts_ptr + place + ns, mask=has, other=0)
    task = tl.load(tasks_ptr + e).to(tl.int64)
    scale = tl.load(scale_ptr + task * scale_stride + ns * scale_step, mask=has, other=0)
    y_ptrs = y_ptr + tl.load(rows_ptr + e).to(tl.int64) * y_stride + ns
    y = tl.load(y_ptrs, mask=has, other=0).to(tl.float32) + total * scale
    tl.store(y_ptrs, y.to(y_ptr.dtype.element_ty), mask=has)
