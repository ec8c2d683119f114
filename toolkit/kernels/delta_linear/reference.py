"""The specification: one row at a time, its fine-tune's change written out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from toolkit.kernels.delta_linear.api import BitDeltas


def delta_linear(y_TN: torch.Tensor, x_TK: torch.Tensor, tasks: Sequence[int], deltas: BitDeltas) -> None:
    """See the api."""
    places = torch.arange(8, dtype=torch.uint8, device=x_TK.device)
    for row, task in enumerate(tasks):
        if task >= 0:
            bits_NK = (deltas.bits_SNB[task][..., None] >> places & 1).flatten(1)[:, : x_TK.shape[1]].to(x_TK.dtype)
            vector_NK = deltas.vector_NK
            change_NK = 2 * bits_NK - 1 if vector_NK is None else bits_NK * vector_NK.to(x_TK.dtype)
            y_TN[row] += deltas.scale_SN[task].to(x_TK.dtype) * (change_NK @ x_TK[row])
