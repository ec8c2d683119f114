"""Sequences of similar lengths together, padded to the longest of them; padding is masked, and may hold anything."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
"""Bytes of a sequence's keys above which it is read where it lies, if it lies together."""

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
    shared, own = list_spans(lengths, prefixes, scoring)
    if scoring.sinks_H is None and not shared and [span.members for span in own] == [(i,) for i in range(len(lengths))]:
        return _one_span_each(q_SHD, cache, own, tables, plain)
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
    q_SHD: torch.Tensor, cache: Cache, own: Sequence[Span], tables: torch.Tensor, scoring: Scoring
) -> tuple[torch.Tensor, torch.Tensor]:
    """Do the work of sequences of which each has one span: nothing is left to merge."""
    starts = _starts(q_SHD, cache, own)
    states = _where_they_lie(q_SHD, cache, starts, scoring) if starts else []
    if len(states) == len(own):
        return torch.cat([out for out, _ in states]), torch.cat([lse for _, lse in states])
    out_SHD = torch.empty_like(q_SHD)
    lse_SH = torch.empty(q_SHD.shape[:2], device=q_SHD.device)
    for span, (out, lse) in zip(starts, states, strict=True):
        row = span.members[0]
        out_SHD[row], lse_SH[row] = out[0], lse[0]
    for spans in _chunks(tuple(span for span in own if span not in starts), _token_bytes(q_SHD, cache)):
        rows = _places(spans, cache.page, tables.shape[1], q_SHD.device, q_SHD.dtype).rows
        out, lse_SH[rows] = _padded(q_SHD[rows], cache, spans, tables, scoring)
        out_SHD[rows] = out.to(q_SHD.dtype)
    return out_SHD, lse_SH


def _token_bytes(q_SHD: torch.Tensor, cache: Cache) -> int:
    return cache.heads * q_SHD.shape[2] * q_SHD.itemsize


def _starts(q_SHD: torch.Tensor, cache: Cache, own: Sequence[Span]) -> dict[Span, int]:
    """Return the spans that are worth a call of their own, as nothing need be copied, and where their tokens begin."""
    if not isinstance(cache, PlainCache) or not cache.first_pages or not cache.lies_together:
        return {}
    enough = WORTH_A_CALL // _token_bytes(q_SHD, cache)
    pages = ((span, cache.first_pages[span.members[0]]) for span in own if span.stop - span.first >= enough)
    return {span: page * cache.page + span.first for span, page in pages if page is not None}


def _where_they_lie(
    q_SHD: torch.Tensor, cache: Cache, starts: Mapping[Span, int], scoring: Scoring
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return output `[1, H, D]` and sum `[1, H]` of each span."""
    assert isinstance(cache, PlainCache)
    k_1GND, v_1GND = cache.tokens()
    q_S1GRD = q_SHD.view(len(q_SHD), 1, cache.heads, -1, q_SHD.shape[2])
    found = []
    for span, start in starts.items():
        count = span.stop - span.first
        k_1GLD, v_1GLD = k_1GND.narrow(2, start, count), v_1GND.narrow(2, start, count)
        out, lse = dense_attention(q_S1GRD[span.members[0]], k_1GLD, v_1GLD, None, scoring)
        found.append((out.reshape(1, *q_SHD.shape[1:]), lse.reshape(1, -1)))
    return found


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
