"""How bits lie in bytes: the first in the lowest bit of the first byte."""

from __future__ import annotations

from functools import cache

import numpy as np
import torch


def split_rows(bits: torch.Tensor, rows: int, width: int) -> torch.Tensor:
    """Return `[rows, ceil(width / 8)]` of the packed bits of a matrix, `[ceil(rows * width / 8)]`.

    Where a row does not fill its last byte, all rows but the first are moved, so that none begins inside a byte.
    """
    if width % 8 == 0:
        return bits.view(rows, -1)
    whole = np.unpackbits(bits.cpu().numpy(), bitorder="little", count=rows * width)
    packed = np.packbits(whole.reshape(rows, width), axis=1, bitorder="little")
    return torch.from_numpy(packed).to(bits.device)


@cache
def meanings(signs: bool, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Return what each byte stands for, `[256, 8]`: zeros and ones, or signs."""
    values = torch.arange(256, device=device)[:, None] >> torch.arange(8, device=device) & 1
    return (values * 2 - 1 if signs else values).to(dtype)


def expand(bits_NB: torch.Tensor, vector_NK: torch.Tensor | None, width: int, dtype: torch.dtype) -> torch.Tensor:
    """Return the changes `[N, width]` that packed bits stand for, before they are scaled, in a dtype."""
    table = meanings(vector_NK is None, dtype, bits_NB.device)
    # Faster on a CPU than shifting every byte eight times.
    change_NK = torch.nn.functional.embedding(bits_NB.int(), table).view(len(bits_NB), -1)[:, :width]
    return change_NK if vector_NK is None else change_NK * vector_NK.to(dtype)
