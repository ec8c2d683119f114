"""A matrix as a low-rank part and a sparse one."""

from __future__ import annotations

import torch
from torch import Tensor

_SETTLED = 1e-4
"""Relative fall of the error, which never rises, at which another iteration is not worth it."""


def low_rank_plus_sparse(matrix: Tensor, rank: int, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Decompose `[M, N]` into a rank and `count` entries, by turns the best of each given the other.

    The low-rank part is found as a product of two factors, each from the other by one multiplication and a QR, without
    singular values: the bilateral scheme of Zhou and Tao, "Greedy Bilateral Sketch, Completion and Smoothing", 2013,
    with a number of entries in the place of a threshold.

    Returns:
        The low-rank part `[M, N]`, and the sorted places of the entries in the flattened matrix.
    """
    generator = torch.Generator().manual_seed(seed)
    right = torch.randn(rank, matrix.shape[1], generator=generator).to(matrix)
    sparse, last = torch.zeros_like(matrix), torch.inf
    while True:
        left = torch.linalg.qr((matrix - sparse) @ right.T).Q
        right = left.T @ (matrix - sparse)
        rest = (matrix - left @ right).flatten()
        places = rest.abs().topk(count).indices
        kept = torch.zeros_like(rest).index_copy(0, places, rest[places])
        sparse, error = kept.reshape(matrix.shape), float((rest - kept).norm())
        if last - error <= _SETTLED * error:
            return left @ right, places.sort().values
        last = error
