"""The specification: softmax over the tokens of one sequence and one head at a time."""

from __future__ import annotations

import torch

from toolkit.kernels.paging import gather


def decode_attention(
    q_SHD: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    lengths: list[int],
    tables: torch.Tensor,
    scale: float,
    window: int | None,
    soft_cap: float | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See the api."""
    out_SHD = torch.empty_like(q_SHD)
    lse_SH = torch.empty(q_SHD.shape[:2], dtype=torch.float32, device=q_SHD.device)
    groups = q_SHD.shape[1] // k_cache.shape[2]
    for sequence, length in enumerate(lengths):
        k_LGD, v_LGD = gather(k_cache, tables[sequence], length), gather(v_cache, tables[sequence], length)
        first = 0 if window is None else max(0, length - window)
        for head in range(q_SHD.shape[1]):
            k, v = k_LGD[first:, head // groups], v_LGD[first:, head // groups]
            scores = (k @ q_SHD[sequence, head]) * scale
            if soft_cap is not None:
                scores = soft_cap * torch.tanh(scores / soft_cap)
            out_SHD[sequence, head] = torch.softmax(scores, dim=0) @ v
            lse_SH[sequence, head] = torch.logsumexp(scores, dim=0)
    return out_SHD, lse_SH
