"""Attention over keys that lie in one tensor: what the torch forms of all attention operations run on.

Shape suffixes: B batches, H heads, Q queries, L tokens, D features.
"""

from __future__ import annotations

import torch

from toolkit.kernels.scoring import Scoring, normalise


def dense_attention(
    q_BHQD: torch.Tensor, k_BHLD: torch.Tensor, v_BHLD: torch.Tensor, seen: torch.Tensor, scoring: Scoring
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend where `seen` says so; what is not seen may hold anything finite.

    On a CPU torch's own fused attention does it, which never writes the scores down, unless they are capped, which it
    cannot do. Scores and sums are float32 whatever the dtype.

    Args:
        q_BHQD: queries.
        k_BHLD: keys; heads of a group may be one expanded tensor.
        v_BHLD: values.
        seen: `[B or 1, 1, Q, L]`.
        scoring: scale, cap and sinks, of `[H, 1]` or `[H, Q]`; its window is not looked at.

    Returns:
        Outputs `[B, H, Q, D]` and logarithms of sums `[B, H, Q]`, float32.
    """
    # Over no keys at all the fused attention divides by zero.
    if scoring.soft_cap is not None or q_BHQD.device.type != "cpu" or not seen.shape[-1]:
        scores = scoring.scores(torch.matmul(q_BHQD.float(), k_BHLD.float().transpose(2, 3)))
        shares, lse = normalise(scores.masked_fill_(~seen, -torch.inf), scoring.sinks_H)
        return torch.matmul(shares, v_BHLD.float()).to(q_BHQD.dtype), lse
    mask = torch.zeros(seen.shape, dtype=q_BHQD.dtype).masked_fill_(~seen, -torch.inf)
    # The function that everybody calls, `scaled_dot_product_attention`, keeps the logarithms of sums to itself.
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q_BHQD, k_BHLD, v_BHLD, 0.0, False, attn_mask=mask, scale=scoring.scale
    )
    lse = lse.masked_fill(~seen.any(dim=-1), -torch.inf)
    if scoring.sinks_H is not None:
        whole = torch.logaddexp(lse, scoring.sinks_H.float())
        out, lse = (out * torch.exp(lse - whole)[..., None]).to(out.dtype), whole
    return out, lse
