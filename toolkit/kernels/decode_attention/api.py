"""Attention of one query token per sequence over paged keys and values.

Shape suffixes: S sequences, H query heads, G key/value heads, D features, P pages, L tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from toolkit.kernels.impl import Impl, resolve

if TYPE_CHECKING:
    import torch


def decode_attention(
    q_SHD: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    lengths: list[int],
    tables: torch.Tensor,
    *,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
    impl: Impl | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend from the last token of each sequence to all of its tokens.

    Args:
        q_SHD: one query per sequence.
        k_cache: `[P, page, G, D]`, this step's keys already stored.
        v_cache: the same of values.
        lengths: tokens of each sequence.
        tables: `[S, pages]`, block tables.
        scale: of the scores.
        window: tokens that a query sees, itself included; `None` sees all.
        soft_cap: scores become `cap * tanh(score / cap)`.
        impl: form to run.

    Returns:
        Outputs `[S, H, D]` and the logarithm of the sum of exponentials of the scores `[S, H]`, float32.
    """
    form = resolve(impl, ("torch", "reference"), q_SHD.device, "decode_attention")
    if form == "torch":
        from toolkit.kernels.decode_attention.torch_form import decode_attention as run
    else:
        from toolkit.kernels.decode_attention.reference import decode_attention as run
    return run(q_SHD, k_cache, v_cache, lengths, tables, scale, window, soft_cap)
