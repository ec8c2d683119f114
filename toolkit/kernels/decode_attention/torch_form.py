"""Sequences of similar lengths together, padded to the longest of them; padding is masked, and may hold anything."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import torch

from toolkit.kernels.decode_attention.api import SharedPrefix
from toolkit.kernels.decode_attention.caches import Cache, PlainCache
from toolkit.kernels.decode_attention.plan import Span, list_spans
from toolkit.kernels.dense import Mask, dense_attention
from toolkit.kernels.merge_states.reference import merge_states
from toolkit.kernels.scoring import Scoring

CHUNK = 2**20
"""Bytes of keys that are worked on at a time, so that they are still in the processor's cache when they are used."""

WORTH_A_CALL = 2**16
"""Bytes of keys that are read where they lie, if they lie together, rather than copied to be beside others."""

Spans = tuple[Span, ...]


def decode_attention(
    q_SHD: torch.Tensor,
    cache: Cache,
    lengths: list[int],
    tables: torch.Tensor,
    scoring: Scoring,
    prefixes: Sequence[SharedPrefix],
) -> tuple[torch.Tensor, torch.Tensor]:
    """See the api."""
    plain = replace(scoring, sinks_H=None)
    if scoring.sinks_H is None and not prefixes and (scoring.window is None or not scoring.num_global):
        return _one_span_each(q_SHD, cache, lengths, tables, plain)
    shared, own = list_spans(lengths, prefixes, scoring)
    groups = (*((span,) for span in shared), *_chunks(tuple(own), _token_bytes(q_SHD, cache)))
    out_SHD = torch.zeros(q_SHD.shape, dtype=torch.float32, device=q_SHD.device)
    lse_SH = torch.full(q_SHD.shape[:2], -torch.inf, device=q_SHD.device)
    if scoring.sinks_H is not None:
        # A sink is a state of its own: an output of zero and a sum of its exponential.
        lse_SH.copy_(scoring.sinks_H.expand_as(lse_SH))
    for spans in groups:
        rows = torch.tensor([m for span in spans for m in span.members], device=q_SHD.device)
        attend = _shared if len(spans[0].members) > 1 else _padded
        out, lse = attend(q_SHD[rows], cache, spans, tables, plain)
        merged = merge_states(torch.stack([out_SHD[rows], out.float()]), torch.stack([lse_SH[rows], lse]))
        out_SHD[rows], lse_SH[rows] = merged
    return out_SHD.to(q_SHD.dtype), lse_SH


def _one_span_each(
    q_SHD: torch.Tensor, cache: Cache, lengths: Sequence[int], tables: torch.Tensor, scoring: Scoring
) -> tuple[torch.Tensor, torch.Tensor]:
    """Do the work of sequences of which each has at most one span: nothing is left to merge."""
    first_pages: tuple[int | None, ...] = ()
    if isinstance(cache, PlainCache) and cache.lies_together:
        first_pages = tuple(cache.first_pages)
    work = _work(tuple(lengths), first_pages, scoring.window, cache.page, _token_bytes(q_SHD, cache), q_SHD.device)
    states = [_where_they_lie(q_SHD, cache, run, scoring) for run in work.runs]
    for spans in work.chunks:
        rows = _places(spans, cache.page, tables.shape[1], q_SHD.device, q_SHD.dtype).rows
        states.append(_padded(q_SHD[rows], cache, spans, tables, scoring))
    if work.blind:
        nothing = q_SHD.new_zeros(work.blind, *q_SHD.shape[1:])
        states.append((nothing, nothing.new_full(nothing.shape[:2], -torch.inf, dtype=torch.float32)))
    if len(states) == 1:
        out_SHD, lse_SH = states[0]
    else:
        out_SHD, lse_SH = torch.cat([out for out, _ in states]), torch.cat([lse for _, lse in states])
    if work.order is not None:
        out_SHD, lse_SH = out_SHD[work.order], lse_SH[work.order]
    return out_SHD, lse_SH


def _token_bytes(q_SHD: torch.Tensor, cache: Cache) -> int:
    return cache.heads * q_SHD.shape[2] * q_SHD.itemsize


@dataclass(frozen=True)
class Run:
    """Sequences of one length that begin equally far from each other, and so are one tensor.

    Attributes:
        rows: of the batch.
        index: the same for a tensor; `None` where they follow each other.
        first: token of the memory at which the first begins.
        step: tokens from one beginning to the next.
        count: tokens of each.
    """

    rows: tuple[int, ...]
    index: torch.Tensor | None
    first: int
    step: int
    count: int


@dataclass(frozen=True)
class _Work:
    """How a batch is divided; the same for all layers that see the same tokens.

    Attributes:
        runs: that are read where they lie.
        chunks: spans that are copied to be beside each other.
        blind: sequences that see nothing, which come last.
        order: where each sequence is among the results of these; `None` where they are in order.
    """

    runs: list[Run]
    chunks: list[Spans]
    blind: int
    order: torch.Tensor | None


@lru_cache(maxsize=4)
def _work(
    lengths: tuple[int, ...],
    first_pages: tuple[int | None, ...],
    window: int | None,
    page: int,
    token_bytes: int,
    device: torch.device,
) -> _Work:
    own = list_spans(lengths, (), Scoring(1.0, window))[1]
    enough = WORTH_A_CALL // token_bytes
    runs = [run for run in _runs(own, first_pages, page, device) if len(run.rows) * run.count >= enough]
    there = {row for run in runs for row in run.rows}
    chunks = _chunks(tuple(span for span in own if span.members[0] not in there), token_bytes)
    rows = [*(row for run in runs for row in run.rows), *(span.members[0] for spans in chunks for span in spans)]
    blind = [row for row in range(len(lengths)) if row not in set(rows)]
    rows += blind
    places = sorted(range(len(rows)), key=rows.__getitem__)
    order = None if places == list(range(len(rows))) else torch.tensor(places, device=device)
    return _Work(runs, chunks, len(blind), order)


def _runs(own: Sequence[Span], first_pages: Sequence[int | None], page: int, device: torch.device) -> Iterator[Run]:
    """Yield all sequences whose pages follow each other, as long runs as there are."""
    found: list[list[tuple[int, int, int]]] = []  # length, beginning and row of each
    begins = [(span, first_pages[span.members[0]]) for span in own] if first_pages else []
    lying = sorted((s.stop - s.first, at * page + s.first, s.members[0]) for s, at in begins if at is not None)
    for one in lying:
        last = found[-1] if found else []
        fits = last and last[-1][0] == one[0] and (len(last) < 2 or one[1] - last[-1][1] == last[1][1] - last[0][1])
        found[-1].append(one) if fits else found.append([one])
    for run in found:
        count, first, _ = run[0]
        rows = tuple(row for _, _, row in run)
        follow = rows == tuple(range(rows[0], rows[0] + len(rows)))
        step = run[1][1] - first if len(run) > 1 else 0
        yield Run(rows, None if follow else torch.tensor(rows, device=device), first, step, count)


def _where_they_lie(q_SHD: torch.Tensor, cache: Cache, run: Run, scoring: Scoring) -> tuple[torch.Tensor, torch.Tensor]:
    """Return outputs `[rows, H, D]` and sums `[rows, H]` of a run."""
    assert isinstance(cache, PlainCache)
    rows = slice(run.rows[0], run.rows[0] + len(run.rows)) if run.index is None else run.index
    q_SGRD = q_SHD[rows].view(len(run.rows), cache.heads, -1, q_SHD.shape[2])
    k_SGLD, v_SGLD = (_strided(t, run) for t in (cache.k, cache.v))
    out, lse = dense_attention(q_SGRD, k_SGLD, v_SGLD, None, scoring)
    return out.reshape(-1, *q_SHD.shape[1:]), lse.reshape(-1, q_SHD.shape[1])


def _strided(cache: torch.Tensor, run: Run) -> torch.Tensor:
    """Return the keys or values of a run, `[S, G, L, D]`, as a view of the memory `[P, page, G, D]`."""
    _, token, head, feature = cache.stride()
    sizes = len(run.rows), cache.shape[2], run.count, cache.shape[3]
    strides = run.step * token, head, token, feature
    return cache.as_strided(sizes, strides, cache.storage_offset() + run.first * token)


@lru_cache(maxsize=4)
def _chunks(spans: Spans, token_bytes: int) -> list[Spans]:
    """Put spans of one sequence each into groups of similar lengths."""
    groups: list[list[Span]] = []
    for span in sorted(spans, key=lambda span: (span.first - span.stop, span.members)):
        group = groups[-1] if groups else []
        longest = group[0].stop - group[0].first if group else 0
        # A sequence may have two spans, and a merge takes one of each at a time.
        twice = any(other.members == span.members for other in group)
        if not group or twice or longest * (len(group) + 1) * token_bytes > CHUNK:
            group = []
            groups.append(group)
        group.append(span)
    return [tuple(group) for group in groups]


@dataclass(frozen=True)
class Places:
    """Where the tokens of some spans are; the same for all layers of a step.

    Attributes:
        rows: `[S]`, sequence of each span; a slice where they follow each other.
        columns: `[S, pages]`, of its block table; a slice where they are the first ones of all.
        mask: which tokens of those pages belong to it, `[S, 1, 1, L]`.
        unseen: places in `[S * L]` of those that do not.
    """

    rows: torch.Tensor | slice
    columns: torch.Tensor | slice
    mask: Mask
    unseen: torch.Tensor


@lru_cache(maxsize=16)
def _places(spans: Spans, page: int, width: int, device: torch.device, dtype: torch.dtype) -> Places:
    first = torch.tensor([span.first for span in spans], device=device)[:, None]
    stop = torch.tensor([span.stop for span in spans], device=device)[:, None]
    most = max(-(-span.stop // page) - span.first // page for span in spans)
    token = (first // page * page) + torch.arange(most * page, device=device)
    seen_SL = (token >= first) & (token < stop)
    mask, unseen = Mask.of(seen_SL[:, None, None], dtype), (~seen_SL).flatten().nonzero()[:, 0]
    rows = [span.members[0] for span in spans]
    if rows == list(range(rows[0], rows[0] + len(rows))) and not bool(first.any()):
        return Places(slice(rows[0], rows[0] + len(rows)), slice(0, most), mask, unseen)
    columns = (first // page + torch.arange(most, device=device)).clamp_(max=width - 1)
    return Places(torch.tensor(rows, device=device), columns, mask, unseen)


def _padded(
    q_SHD: torch.Tensor, cache: Cache, spans: Spans, tables: torch.Tensor, scoring: Scoring
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend from one query to each span."""
    places = _places(spans, cache.page, tables.shape[1], q_SHD.device, q_SHD.dtype)
    rows, columns = places.rows, places.columns
    pages = tables[rows, columns] if isinstance(rows, slice) else tables[rows[:, None], columns]
    k_SLGD, v_SLGD = (t.flatten(1, 2) for t in cache.read(pages))
    if len(places.unseen):
        # A weight of zero does not silence what is not finite.
        for numbers in (k_SLGD, v_SLGD):
            numbers.flatten(0, 1).index_fill_(0, places.unseen, 0)
    q_SGRD = q_SHD.view(len(spans), cache.heads, -1, q_SHD.shape[2])
    out, lse = dense_attention(q_SGRD, k_SLGD.transpose(1, 2), v_SLGD.transpose(1, 2), places.mask, scoring)
    return out.reshape(q_SHD.shape), lse.reshape(q_SHD.shape[:2])


def _shared(
    q_SHD: torch.Tensor, cache: Cache, spans: Spans, tables: torch.Tensor, scoring: Scoring
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend from all queries of one span to its tokens, which are read once."""
    (span,) = spans
    count, size = len(span.members), q_SHD.shape[2]
    pages = tables[span.members[0], : -(-span.stop // cache.page)]
    k_GLD, v_GLD = (t.flatten(0, 1)[: span.stop].transpose(0, 1) for t in cache.read(pages))
    q_GQD = q_SHD.view(count, cache.heads, -1, size).transpose(0, 1).reshape(cache.heads, -1, size)
    seen = torch.ones(1, 1, q_GQD.shape[1], span.stop, dtype=torch.bool, device=q_SHD.device)
    out, lse = dense_attention(q_GQD[None], k_GLD[None], v_GLD[None], Mask.of(seen, q_SHD.dtype), scoring)
    out = out.view(cache.heads, count, -1, size).transpose(0, 1).reshape(q_SHD.shape)
    return out, lse.view(cache.heads, count, -1).transpose(0, 1).reshape(q_SHD.shape[:2])
