"""The specification: softmax of masked scores, one sequence at a time, in the dtype of the inputs."""

from __future__ import annotations

import torch

from toolkit.kernels.paging import gather, visible


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
    outputs, sums = [], []
    for index, length in enumerate(lengths):
        q = q_THD[starts[index] : starts[index + 1]]
        groups = q.shape[1] // k_cache.shape[2]
        k = gather(k_cache, tables[index], length).repeat_interleave(groups, dim=1)
        v = gather(v_cache, tables[index], length).repeat_interleave(groups, dim=1)
        scores = torch.einsum("qhd,khd->hqk", q, k) * scale
        if soft_cap is not None:
            scores = soft_cap * torch.tanh(scores / soft_cap)
        scores = scores.masked_fill(~visible(length - len(q), length, length, window, q.device), -torch.inf)
        lse = torch.logsumexp(scores, dim=-1)
        outputs.append(torch.einsum("hqk,khd->qhd", torch.exp(scores - lse[..., None]), v))
        sums.append(lse.T)
    return torch.cat(outputs), torch.cat(sums).float()
