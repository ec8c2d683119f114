"""Batched products over the heads, a block of queries at a time so that scores never take `T x T` memory.

Scores and sums are float32 whatever the dtype of the cache.
"""

from __future__ import annotations

import torch

from toolkit.kernels.paging import gather, visible

BLOCK = 256
"""Queries that are worked on at a time."""


def prefill_attention(
    q_THD: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    starts: list[int],
    lengths: list[int],
    tables: torch.Tensor,
    scale: float,
    window: int | None,
    soft_cap: float | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See the api."""
    out_THD = torch.empty_like(q_THD)
    lse_TH = torch.empty(q_THD.shape[:2], dtype=torch.float32, device=q_THD.device)
    heads, size = k_cache.shape[2:]
    for index, length in enumerate(lengths):
        first, last = starts[index], starts[index + 1]
        k_GLD = gather(k_cache, tables[index], length).transpose(0, 1).float()
        v_GLD = gather(v_cache, tables[index], length).transpose(0, 1).float()
        for row in range(first, last, BLOCK):
            end = min(row + BLOCK, last)
            # Queries see nothing after themselves, so neither do the products.
            seen = length - (last - end)
            q_GQD = q_THD[row:end].float().view(end - row, heads, -1, size).permute(1, 2, 0, 3).reshape(heads, -1, size)
            scores = torch.bmm(q_GQD * scale, k_GLD[:, :seen].transpose(1, 2)).view(heads, -1, end - row, seen)
            if soft_cap is not None:
                scores = soft_cap * torch.tanh(scores / soft_cap)
            allowed = visible(seen - (end - row), seen, seen, window, q_THD.device)
            scores.masked_fill_(~allowed, -torch.inf)
            lse = torch.logsumexp(scores, dim=-1)
            shares = torch.exp(scores - lse[..., None]).view(heads, -1, seen)
            out = torch.bmm(shares, v_GLD[:, :seen]).view(heads, -1, end - row, size)
            out_THD[row:end] = out.permute(2, 0, 1, 3).reshape(end - row, -1, size)
            lse_TH[row:end] = lse.permute(2, 0, 1).reshape(end - row, -1)
    return out_THD, lse_TH
