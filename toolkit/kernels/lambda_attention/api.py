"""Attention of LM-Infinite: a window and the first tokens, no further away than a ceiling.

It has no kernel of its own: the window is one attention, the first tokens another, and both are merged exactly.

Shape suffixes: T query tokens, H query heads, G key/value heads, D features, P pages, S sequences, N global tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from toolkit.kernels.impl import Impl

if TYPE_CHECKING:
    import torch


def lambda_attention(
    q_THD: torch.Tensor,
    far_q_THD: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    far_k_SNGD: torch.Tensor,
    starts: list[int],
    lengths: list[int],
    tables: torch.Tensor,
    *,
    scale: float,
    window: int,
    soft_cap: float | None = None,
    impl: Impl | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend to the last `window` tokens where they are, and to the first N as if they were `window` tokens away.

    LM-Infinite (Han et al. 2023, arXiv:2308.16137) runs a model with rotary embeddings beyond the length it was trained
    at: take that length as the window. Only the N first and the `window` last tokens of a sequence need be kept: with
    the others gone from its pages, and `lengths` smaller by as many, the result is the same.

    Args:
        q_THD: queries, rotated to their positions; those of a sequence are its last tokens.
        far_q_THD: the same queries, rotated to position `window`.
        k_cache: `[P, page, G, D]`, keys rotated to their positions.
        v_cache: values.
        far_k_SNGD: keys of the first tokens of each sequence, not rotated.
        starts: first query row of each sequence, and T at the end.
        lengths: tokens of each sequence.
        tables: `[S, pages]`, block tables.
        scale: of the scores.
        window: tokens that a query sees where they are, itself included; N at least.
        soft_cap: scores become `cap * tanh(score / cap)`.
        impl: form to run.

    Returns:
        Outputs `[T, H, D]` and logarithms of sums `[T, H]`, float32.
    """
    import torch

    from toolkit.kernels.merge_states import merge_states
    from toolkit.kernels.paging import gather
    from toolkit.kernels.prefill_attention import prefill_attention
    from toolkit.kernels.prefill_attention.api import last_positions

    num_global, page = far_k_SNGD.shape[1], v_cache.shape[1]
    near = prefill_attention(
        q_THD, k_cache, v_cache, starts, lengths, tables, scale=scale, window=window, soft_cap=soft_cap, impl=impl
    )
    # Each sequence's first tokens are one page; a query sees those that are at least a window before it.
    first = gather(v_cache, tables, min(num_global, tables.shape[1] * page))
    far_v_SNGD = torch.zeros_like(far_k_SNGD)
    far_v_SNGD[:, : first.shape[1]] = first
    far = prefill_attention(
        far_q_THD,
        far_k_SNGD,
        far_v_SNGD,
        starts,
        [min(num_global, length) for length in lengths],
        torch.arange(len(lengths), device=tables.device)[:, None],
        scale=scale,
        soft_cap=soft_cap,
        positions=[position - window for position in last_positions(starts, lengths)],
        impl=impl,
    )
    out_NTHD, lse_NTH = (torch.stack(parts) for parts in zip(near, far, strict=True))
    return merge_states(out_NTHD, lse_NTH, impl="triton" if impl == "triton" else None)
