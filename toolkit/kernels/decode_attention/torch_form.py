"""One batched product for all sequences, padded to the longest; padding is masked, and may hold anything.

Scores and sums are float32 whatever the dtype of the cache.
"""

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
    num_heads, size = q_SHD.shape[1:]
    heads = k_cache.shape[2]
    longest = max(lengths)
    length = torch.tensor(lengths, device=q_SHD.device)[:, None]
    position = torch.arange(longest, device=q_SHD.device)[None]
    hidden = position >= length
    if window is not None:
        hidden |= position < length - window
    k_SGLD = gather(k_cache, tables, longest).transpose(1, 2).float()
    # A weight of zero does not silence what is not finite, so unseen values are zeroed.
    v_SGLD = gather(v_cache, tables, longest).masked_fill(hidden[..., None, None], 0).transpose(1, 2).float()
    q_SGRD = q_SHD.float().view(len(lengths), heads, num_heads // heads, size)
    scores = torch.matmul(q_SGRD * scale, k_SGLD.transpose(2, 3))
    if soft_cap is not None:
        scores = soft_cap * torch.tanh(scores / soft_cap)
    scores.masked_fill_(hidden[:, None, None], -torch.inf)
    lse = torch.logsumexp(scores, dim=-1)
    out = torch.matmul(torch.exp(scores - lse[..., None]), v_SGLD).to(q_SHD.dtype)
    return out.reshape(len(lengths), num_heads, size), lse.reshape(len(lengths), num_heads)
