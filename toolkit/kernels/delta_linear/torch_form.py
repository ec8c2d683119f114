"""A few outputs at a time: what their bits stand for is written out and still in the processor's cache when used."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from toolkit.kernels.delta_linear.bits import expand
from toolkit.kernels.delta_linear.rows import rows_by_task

if TYPE_CHECKING:
    from toolkit.kernels.delta_linear.api import BitDeltas

BLOCK = 2**17
"""Weights that are written out at a time."""

MANY = 16
"""Rows from which a product in bfloat16 is faster than one in float32, its matrix units being worth the rounding."""


def delta_linear(y_TN: torch.Tensor, x_TK: torch.Tensor, tasks: Sequence[int], deltas: BitDeltas) -> None:
    """See the api."""
    for task, rows in rows_by_task(tasks).items():
        if rows[-1] - rows[0] + 1 == len(rows):
            at = slice(rows[0], rows[-1] + 1)
            y_TN[at] += _change(x_TK[at], task, deltas)
        else:
            index = torch.tensor(rows, device=x_TK.device)
            y_TN[index] = (y_TN[index] + _change(x_TK[index], task, deltas)).to(y_TN.dtype)


def _change(x_TK: torch.Tensor, task: int, deltas: BitDeltas) -> torch.Tensor:
    """Return what one fine-tune adds to the outputs of some rows, float32 or wider."""
    (rows, width), outputs = x_TK.shape, deltas.bits_SNB.shape[1]
    dtype = wide = torch.promote_types(x_TK.dtype, torch.float32)
    if x_TK.dtype == torch.bfloat16 and rows >= MANY:
        dtype = torch.bfloat16
    x_TK, change_TN = x_TK.to(dtype), x_TK.new_empty(rows, outputs, dtype=dtype)
    step = max(1, BLOCK // max(1, width))
    for first in range(0, outputs, step):
        own = slice(first, first + step)
        vector = None if deltas.vector_NK is None else deltas.vector_NK[own]
        torch.mm(x_TK, expand(deltas.bits_SNB[task, own], vector, width, dtype).T, out=change_TN[:, own])
    return change_TN.to(wide).mul_(deltas.scale_SN[task])
