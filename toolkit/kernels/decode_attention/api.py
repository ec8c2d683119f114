"""Attention of one query token per sequence over paged keys and values.

Shape suffixes: S sequences, H query heads, G key/value heads, D features, P pages, L tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from toolkit.kernels.impl import Impl, resolve

if TYPE_CHECKING:
    import torch

    from toolkit.kernels.decode_attention.caches import Cache
    from toolkit.kernels.kv_quant import QuantizedCache
    from toolkit.kernels.scoring import Scoring


@dataclass(frozen=True)
class SharedPrefix:
    """First tokens that lie in the same pages for several sequences.

    Attributes:
        sequences: their indices in the batch; the block table of the first is read.
        length: tokens they have in common.
    """

    sequences: tuple[int, ...]
    length: int


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
    num_global: int = 0,
    sinks_H: torch.Tensor | None = None,
    prefixes: Sequence[SharedPrefix] = (),
    first_pages: Sequence[int | None] = (),
    impl: Impl | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend from the last token of each sequence to all of its tokens.

    Args:
        q_SHD: one query per sequence.
        k_cache: `[P, page, G, D]`, this step's keys already stored.
        v_cache: the same of values.
        lengths: tokens of each sequence; of none, the result is 0 and minus infinity.
        tables: `[S, pages]`, block tables.
        scale: of the scores.
        window: tokens that a query sees, itself included; `None` sees all.
        soft_cap: scores become `cap * tanh(score / cap)`.
        num_global: first tokens that are seen whatever the window.
        sinks_H: score of a further key per head that has no value; it counts in the sums.
        prefixes: tokens that several sequences share. They change nothing but how often memory is read: once for all
            of the sequences. With a window they are of no use and not looked at.
        first_pages: of each sequence whose pages follow each other, `None` for others. They change nothing but speed:
            on a CPU such a sequence is read where it lies.
        impl: form to run.

    Returns:
        Outputs `[S, H, D]` and the logarithm of the sum of exponentials of the scores `[S, H]`, float32.

    Raises:
        ValueError: tensors that do not fit each other, or prefixes that overlap or are longer than a sequence.
        UnsupportedError: no such form on this device.
    """
    from toolkit.kernels.decode_attention.caches import PlainCache
    from toolkit.kernels.prefill_attention.api import check_tensors
    from toolkit.kernels.scoring import Scoring

    scoring = Scoring(scale, window, num_global, soft_cap, sinks_H)
    check_tensors(q_SHD, k_cache, v_cache, scoring)
    return _run(q_SHD, PlainCache(k_cache, v_cache, first_pages), lengths, tables, scoring, prefixes, impl)


def quantized_decode_attention(
    q_SHD: torch.Tensor,
    cache: QuantizedCache,
    lengths: list[int],
    tables: torch.Tensor,
    *,
    scale: float,
    window: int | None = None,
    soft_cap: float | None = None,
    num_global: int = 0,
    sinks_H: torch.Tensor | None = None,
    prefixes: Sequence[SharedPrefix] = (),
    impl: Impl | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Do the same over quantised keys and values, which are read as codes.

    Tokens that are still in full precision, as the last page of a sequence is while it fills, are a `decode_attention`
    of their own; `merge_states` merges the two.

    Args:
        q_SHD: in the dtype that the codes stand for.
        cache: keys and values.
        lengths: tokens of each sequence.
        tables: `[S, pages]`, block tables of the quantised cache.
        scale: as in `decode_attention`, and so are the rest.
        window: tokens that a query sees.
        soft_cap: bound of the scores.
        num_global: first tokens that are seen whatever the window.
        sinks_H: score of a further key per head.
        prefixes: tokens that several sequences share.
        impl: form to run.

    Returns:
        Outputs `[S, H, D]` and logarithms of sums `[S, H]`.

    Raises:
        ValueError: tensors that do not fit each other, or prefixes that overlap or are longer than a sequence.
        UnsupportedError: no such form on this device.
    """
    from toolkit.kernels.scoring import Scoring

    scoring = Scoring(scale, window, num_global, soft_cap, sinks_H)
    scoring.check(q_SHD.shape[1])
    if q_SHD.shape[1] % cache.heads or q_SHD.shape[2] != cache.size or q_SHD.dtype != cache.dtype:
        raise ValueError(
            f"queries {tuple(q_SHD.shape)} in {q_SHD.dtype} for {cache.heads} heads of {cache.size} in {cache.dtype}"
        )
    return _run(q_SHD, cache, lengths, tables, scoring, prefixes, impl)


def _run(
    q_SHD: torch.Tensor,
    cache: Cache,
    lengths: list[int],
    tables: torch.Tensor,
    scoring: Scoring,
    prefixes: Sequence[SharedPrefix],
    impl: Impl | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    form = resolve(impl, ("triton", "torch", "reference"), q_SHD.device, "decode_attention")
    _check_prefixes(lengths, prefixes)
    if form == "reference":
        from toolkit.kernels.decode_attention.reference import decode_attention as specified

        return specified(q_SHD, cache, lengths, tables, scoring)
    if form == "triton":
        from toolkit.kernels.decode_attention.triton_form import decode_attention as run
    else:
        from toolkit.kernels.decode_attention.torch_form import decode_attention as run
    return run(q_SHD, cache, lengths, tables, scoring, prefixes)


def _check_prefixes(lengths: list[int], prefixes: Sequence[SharedPrefix]) -> None:
    members = [sequence for prefix in prefixes for sequence in prefix.sequences]
    if len(set(members)) < len(members):
        raise ValueError("a sequence has one shared prefix at most")
    for prefix in prefixes:
        if any(prefix.length > lengths[sequence] for sequence in prefix.sequences):
            raise ValueError(f"a shared prefix of {prefix.length} tokens is longer than one of its sequences")
