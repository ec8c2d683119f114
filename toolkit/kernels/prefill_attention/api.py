"""Causal attention of several query tokens per sequence, over paged keys and values or over packed ones.

Shape suffixes: T query tokens, L key tokens, H query heads, G key/value heads, D features, P pages, S sequences.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

from toolkit.kernels.impl import Impl, resolve

if TYPE_CHECKING:
    import torch

    from toolkit.kernels.scoring import Scoring


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
    num_global: int = 0,
    sinks_H: torch.Tensor | None = None,
    positions: Sequence[int] | None = None,
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
        num_global: first tokens that every later query sees whatever the window.
        sinks_H: score of a further key per head that has no value; it counts in the sums.
        positions: position of each sequence's first query among its tokens, where queries are not the last of them; at
            `length` or later a query sees all tokens, below 0 none.
        impl: form to run.

    Returns:
        Outputs `[T, H, D]` and the logarithm of the sum of exponentials of the scores `[T, H]`, float32. A query that
        sees no token has 0 and minus infinity.

    Raises:
        ValueError: tensors that do not fit each other.
        UnsupportedError: no such form on this device.
    """
    from toolkit.kernels.scoring import Scoring

    form = resolve(impl, ("triton", "torch", "reference"), q_THD.device, "prefill_attention")
    scoring = Scoring(scale, window, num_global, soft_cap, sinks_H)
    check_tensors(q_THD, k_cache, v_cache, scoring)
    places = last_positions(starts, lengths) if positions is None else list(positions)
    if form == "triton":
        from toolkit.kernels.prefill_attention.triton_form import prefill_attention as run
    elif form == "torch":
        from toolkit.kernels.prefill_attention.torch_form import prefill_attention as run
    else:
        from toolkit.kernels.prefill_attention.reference import prefill_attention as run
    return run(q_THD, k_cache, v_cache, starts, lengths, tables, places, scoring)


def packed_attention(
    q_THD: torch.Tensor,
    k_LGD: torch.Tensor,
    v_LGD: torch.Tensor,
    starts: Sequence[int],
    key_starts: Sequence[int] | None = None,
    *,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
    num_global: int = 0,
    sinks_H: torch.Tensor | None = None,
    positions: Sequence[int] | None = None,
    impl: Impl | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Do the same over keys and values of all sequences one after another, with gradients: for training.

    Both results may be used in a loss; queries, keys, values and sinks get gradients.

    Args:
        q_THD: queries.
        k_LGD: keys.
        v_LGD: values.
        starts: first query row of each sequence, and T at the end.
        key_starts: first key row of each sequence, and L at the end; the queries' if `None`.
        scale: as in `prefill_attention`, and so are the rest.
        window: tokens that a query sees.
        soft_cap: bound of the scores.
        num_global: first tokens that every later query sees.
        sinks_H: score of a further key per head.
        positions: of first queries.
        impl: form to run.

    Returns:
        Outputs `[T, H, D]` and logarithms of sums `[T, H]`.

    Raises:
        ValueError: tensors that do not fit each other.
        UnsupportedError: no such form on this device.
    """
    from toolkit.kernels.scoring import Scoring

    form = resolve(impl, ("triton", "reference"), q_THD.device, "packed_attention")
    scoring = Scoring(scale, window, num_global, soft_cap, sinks_H)
    check_tensors(q_THD, k_LGD, v_LGD, scoring)
    rows, keys = list(starts), list(starts if key_starts is None else key_starts)
    if len(rows) != len(keys) or rows[-1] != len(q_THD) or keys[-1] != len(k_LGD):
        raise ValueError(f"sequences begin at queries {rows} and keys {keys} of {len(q_THD)} and {len(k_LGD)}")
    lengths = [stop - start for start, stop in pairwise(keys)]
    places = last_positions(rows, lengths) if positions is None else list(positions)
    if form == "triton":
        from toolkit.kernels.prefill_attention.packed import packed_attention as run
    else:
        from toolkit.kernels.prefill_attention.reference import packed_attention as run
    return run(q_THD, k_LGD, v_LGD, rows, keys, places, scoring)


def last_positions(starts: Sequence[int], lengths: Sequence[int]) -> list[int]:
    """Return the positions of first queries, where the queries of a sequence are the last of its tokens."""
    return [length - (starts[i + 1] - starts[i]) for i, length in enumerate(lengths)]


def check_tensors(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scoring: Scoring) -> None:
    """Raise `ValueError` for what no attention can be made of.

    Args:
        q: `[..., H, D]`.
        k: `[..., G, D]`.
        v: the same.
        scoring: of these heads.
    """
    if k.shape != v.shape or k.shape[-1] != q.shape[-1] or q.shape[-2] % k.shape[-2]:
        shapes = ", ".join(str(tuple(t.shape)) for t in (q, k, v))
        raise ValueError(f"queries, keys and values of shapes {shapes}: heads or features do not fit each other")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"queries, keys and values of different types: {q.dtype}, {k.dtype}, {v.dtype}")
    if any(t.stride(-1) != 1 for t in (q, k, v) if t.shape[-1] > 1):
        raise ValueError("features of queries, keys and values must lie next to each other")
    scoring.check(q.shape[-2])
