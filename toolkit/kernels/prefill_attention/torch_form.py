"""A block of queries at a time, so that masks and scores never take `T x T` memory, over the keys that it can see."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import torch

from toolkit.kernels.dense import CAUSAL, Mask, dense_attention
from toolkit.kernels.paging import gather, visible
from toolkit.kernels.scoring import Scoring

BLOCK = 256
"""Queries that are worked on at a time."""

SMALL = 2**16
"""Elements of a mask that is kept for the layers to come."""


def prefill_attention(
    q_THD: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    starts: list[int],
    lengths: list[int],
    tables: torch.Tensor,
    positions: list[int],
    scoring: Scoring,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See the api."""
    out_THD = torch.empty(q_THD.shape, dtype=q_THD.dtype, device=q_THD.device)
    lse_TH = torch.empty(q_THD.shape[:2], dtype=torch.float32, device=q_THD.device)
    for index, length in enumerate(lengths):
        k_LGD, v_LGD = gather(k_cache, tables[index], length), gather(v_cache, tables[index], length)
        for row in range(starts[index], starts[index + 1], BLOCK):
            rows = slice(row, min(row + BLOCK, starts[index + 1]))
            position = positions[index] + row - starts[index]
            out_THD[rows], lse_TH[rows] = _block(q_THD[rows], k_LGD, v_LGD, position, scoring)
    return out_THD, lse_TH


def _block(
    q_QHD: torch.Tensor, k_LGD: torch.Tensor, v_LGD: torch.Tensor, position: int, scoring: Scoring
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend from consecutive queries of one sequence, the first at `position`; returns `[Q, H, D]` and `[Q, H]`."""
    queries, heads, size = len(q_QHD), k_LGD.shape[1], q_QHD.shape[2]
    stop = max(0, min(len(k_LGD), position + queries))
    first = min(scoring.first_seen(position), stop)
    keys = slice(0, stop) if first <= scoring.num_global else slice(first, stop)
    if 0 < scoring.num_global < first:
        keys = torch.cat([torch.arange(scoring.num_global), torch.arange(first, stop)]).to(q_QHD.device)
    q_GRQD = q_QHD.view(queries, heads, -1, size).permute(1, 2, 0, 3)
    shape = (*q_GRQD.shape[:2], -1, size)
    k_GRLD, v_GRLD = (t[keys].transpose(0, 1)[:, None].expand(shape) for t in (k_LGD, v_LGD))
    if scoring.sinks_H is not None:
        scoring = replace(scoring, sinks_H=scoring.sinks_H.view(heads, -1, 1))
    mask = _mask(position, queries, stop, keys, scoring, q_QHD)
    out_GRQD, lse_GRQ = dense_attention(q_GRQD, k_GRLD, v_GRLD, mask, scoring)
    return out_GRQD.permute(2, 0, 1, 3).reshape(q_QHD.shape), lse_GRQ.permute(2, 0, 1).reshape(queries, -1)


def _mask(
    position: int, queries: int, stop: int, keys: slice | torch.Tensor, scoring: Scoring, q_QHD: torch.Tensor
) -> Mask:
    if position == 0 and stop == queries and (scoring.window is None or scoring.window >= stop):
        return CAUSAL
    asked = position, position + queries, stop, scoring.window, q_QHD.device, scoring.num_global
    if isinstance(keys, slice) and queries * stop <= SMALL:
        return _small_mask(asked, keys.start, q_QHD.dtype)
    return Mask.of(visible(*asked)[None, None, :, keys], q_QHD.dtype)


@lru_cache(maxsize=64)
def _small_mask(asked: tuple[int, int, int, int | None, torch.device, int], first: int, dtype: torch.dtype) -> Mask:
    return Mask.of(visible(*asked)[None, None, :, first:], dtype)
