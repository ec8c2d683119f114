"""Causal attention of several query tokens per sequence over paged keys and values.

Shape suffixes: T query tokens, H query heads, G key/value heads, D features, P pages.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from toolkit.kernels.impl import Impl, resolve

if TYPE_CHECKING:
    import torch


def prefill_attention(
    q_THD: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    starts: list[int],
    lengths: list[int],
    tables: torch.Tensor,
    *,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
    impl: Impl | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend from the last tokens of each sequence to all of its tokens up to themselves.

    Args:
        q_THD: queries of all sequences, one after another.
        k_cache: `[P, page, G, D]`, this step's keys already stored.
        v_cache: the same of values.
        starts: first query row of each sequence, and T at the end.
        lengths: tokens of each sequence; its queries are the last of them.
        tables: `[S, pages]`, block tables.
        scale: of the scores.
        window: tokens that a query sees, itself included; `None` sees all.
        soft_cap: scores become `cap * tanh(score / cap)`.
        impl: form to run.

    Returns:
        Outputs `[T, H, D]` and the logarithm of the sum of exponentials of the scores `[T, H]`, float32.
    """
    form = resolve(impl, ("torch", "reference"), q_THD.device, "prefill_attention")
    if form == "torch":
        from toolkit.kernels.prefill_attention.torch_form import prefill_attention as run
    else:
        from toolkit.kernels.prefill_attention.reference import prefill_attention as run
    return run(q_THD, k_cache, v_cache, starts, lengths, tables, scale, window, soft_cap)
