"""Attention over keys that lie in one tensor: what the torch forms of all attention operations run on.

Shape suffixes: B batches, H heads, Q queries, L tokens, D features.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from toolkit.kernels.scoring import Scoring, normalise


@dataclass(frozen=True)
class Mask:
    """Which tokens the queries see, once in each of the forms that are needed; layers of one step share it.

    Attributes:
        seen: `[B or 1, 1, Q, L]`; `None` where each query sees the tokens up to its own place.
        added: 0 or minus infinity for the scores, in the dtype of the queries.
        blind: `[B or 1, 1, Q]`, the queries that see nothing; `None` if all see something.
    """

    seen: torch.Tensor | None = None
    added: torch.Tensor | None = None
    blind: torch.Tensor | None = None

    @classmethod
    def of(cls, seen: torch.Tensor, dtype: torch.dtype) -> Mask:
        """Prepare `seen` for queries of a dtype."""
        added = torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, -torch.inf)
        blind = ~seen.any(dim=-1)
        return cls(seen, added, blind if bool(blind.any()) else None)


CAUSAL = Mask()
"""The first queries of a sequence, over as many tokens."""


def dense_attention(
    q_BHQD: torch.Tensor, k_BHLD: torch.Tensor, v_BHLD: torch.Tensor, mask: Mask | None, scoring: Scoring
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend where the mask says so; what is not seen may hold anything finite.

    On a CPU torch's own fused attention does it, which never writes the scores down, unless they are capped, which it
    cannot do. Scores and sums are float32 whatever the dtype.

    Args:
        q_BHQD: queries.
        k_BHLD: keys; heads of a group may be one expanded tensor.
        v_BHLD: values.
        mask: tokens that they see; `None` is all.
        scoring: scale, cap and sinks, of `[H, 1]` or `[H, Q]`; its window is not looked at.

    Returns:
        Outputs `[B, H, Q, D]` and logarithms of sums `[B, H, Q]`, float32.
    """
    # Over no keys at all the fused attention divides by zero.
    if scoring.soft_cap is not None or q_BHQD.device.type != "cpu" or not k_BHLD.shape[2]:
        return _written_out(q_BHQD, k_BHLD, v_BHLD, mask, scoring)
    # The function that everybody calls, `scaled_dot_product_attention`, keeps the logarithms of sums to itself.
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q_BHQD,
        k_BHLD,
        v_BHLD,
        0.0,
        mask is not None and mask.seen is None,
        attn_mask=mask and mask.added,
        scale=scoring.scale,
    )
    if mask and mask.blind is not None:
        lse = lse.masked_fill(mask.blind, -torch.inf)
    if scoring.sinks_H is not None:
        whole = torch.logaddexp(lse, scoring.sinks_H.float())
        out, lse = (out * torch.exp(lse - whole)[..., None]).to(out.dtype), whole
    return out, lse


def _written_out(
    q_BHQD: torch.Tensor, k_BHLD: torch.Tensor, v_BHLD: torch.Tensor, mask: Mask | None, scoring: Scoring
) -> tuple[torch.Tensor, torch.Tensor]:
    """Do the same by way of all scores."""
    scores = scoring.scores(torch.matmul(q_BHQD.float(), k_BHLD.float().transpose(2, 3)))
    if mask is not None:
        seen = mask.seen if mask.seen is not None else torch.ones_like(scores[:1, :1], dtype=torch.bool).tril()
        scores = scores.masked_fill_(~seen, -torch.inf)
    shares, lse = normalise(scores, scoring.sinks_H)
    return torch.matmul(shares, v_BHLD.float()).to(q_BHQD.dtype), lse
