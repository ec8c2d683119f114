"""How the work of a decode step is divided: Lean Attention's even division of all tiles (arXiv:2405.10480).

A *span* is some tokens and the sequences whose queries see all of them: a sequence's own tokens, its global ones before
its window, or a prefix that several share. Each span is cut into tiles of tokens, once per key/value head. The tiles of
all spans and heads in one row are cut into equal parts, one per program, wherever that falls; a *piece* is what one
program does of one span and head. Its result is a partial state of every query of the span, and all pieces of a query
are merged at the end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from toolkit.kernels.decode_attention.api import SharedPrefix
from toolkit.kernels.fixed import FixedLists
from toolkit.kernels.scoring import Scoring


@dataclass(frozen=True)
class Span:
    """Tokens `first` to `stop` of the block table of `members[0]`, seen by the queries of all members."""

    members: tuple[int, ...]
    first: int
    stop: int


def list_spans(
    lengths: Sequence[int], prefixes: Sequence[SharedPrefix], scoring: Scoring
) -> tuple[list[Span], list[Span]]:
    """Return the spans that sequences share, and those that belong to one."""
    begins = [scoring.first_seen(length - 1) for length in lengths]
    used = [prefix for prefix in prefixes if scoring.window is None and len(prefix.sequences) > 1 and prefix.length]
    for prefix in used:
        for sequence in prefix.sequences:
            begins[sequence] = prefix.length
    own = [Span((i,), begin, length) for i, (begin, length) in enumerate(zip(begins, lengths, strict=True))]
    if scoring.window is not None:
        own += [Span((i,), 0, min(scoring.num_global, begin)) for i, begin in enumerate(begins)]
    return [Span(p.sequences, 0, p.length) for p in used], [span for span in own if span.stop > span.first]


@dataclass(frozen=True)
class Pieces:
    """The work of one launch.

    Attributes:
        members: sequences of all spans, one after another.
        bounds: `[programs + 1]`, the first piece of each program.
        pieces: `[*, 7]`: first of its members, how many, sequence whose block table it reads, key/value head, first
            token, token after the last, and the row of the partial states where its first query's heads begin.
        rows: partial states in all, one per query head.
    """

    members: np.ndarray
    bounds: np.ndarray
    pieces: np.ndarray
    rows: int


def divide(spans: Sequence[Span], heads: int, group: int, block: int, programs: int, first_row: int = 0) -> Pieces:
    """Cut the tiles of all spans and heads into equal parts; no two programs differ by more than one tile.

    Args:
        spans: each with at least one token.
        heads: key/value heads.
        group: query heads of each.
        block: tokens of a tile; tiles begin at its multiples.
        programs: as many as there should be; no more than tiles.
        first_row: row of the first partial state.
    """
    sizes = np.array([len(span.members) for span in spans], np.int64)
    first = np.array([span.first for span in spans], np.int64)
    stop = np.array([span.stop for span in spans], np.int64)
    members = np.array([member for span in spans for member in span.members], np.int64)
    begins = np.cumsum(sizes) - sizes
    tiles = np.repeat(-(-stop // block) - first // block, heads)
    ends = np.cumsum(tiles)
    total = int(tiles.sum())
    programs = min(programs, total)
    cuts = np.arange(programs + 1) * total // max(1, programs)
    edges = np.union1d(cuts, ends)
    starts, stops = edges[:-1], edges[1:]
    unit = np.searchsorted(ends, starts, "right")
    span, head, before = unit // heads, unit % heads, (ends - tiles)[unit]
    origin = first[span] // block
    tokens = np.maximum(first[span], (origin + starts - before) * block)
    last = np.minimum(stop[span], (origin + stops - before) * block)
    rows = sizes[span] * group
    places = first_row + np.cumsum(rows) - rows
    pieces = np.stack([begins[span], sizes[span], members[begins[span]], head, tokens, last, places], axis=1)
    return Pieces(members, np.searchsorted(starts, cuts), pieces, int(rows.sum()))


class FixedLengths(list[int]):
    """Lengths of a fixed number of sequences, which change in place with the work lists that were made of them.

    A captured graph of `decode_attention` reads these lists, so it serves whatever lengths they are set to.
    """

    def __init__(self, lengths: Sequence[int]) -> None:
        super().__init__(lengths)
        self.lists: dict[object, FixedLists] = {}

    def change(self, lengths: Sequence[int]) -> None:
        """Set other lengths, as many as before."""
        if len(lengths) != len(self):
            raise ValueError(f"{len(lengths)} lengths in place of {len(self)}")
        self[:] = lengths
        for lists in self.lists.values():
            lists.refresh()


def merge_lists(parts: Sequence[Pieces], sequences: int, heads: int, group: int) -> tuple[np.ndarray, np.ndarray]:
    """Return which partial states make up each query: bounds and entries as `merge_rows` takes them."""
    owners, entries = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    for part in parts:
        begin, count, _, head, _, _, place = part.pieces.T
        index = np.repeat(np.arange(len(count)), count)
        within = np.arange(len(index)) - np.repeat(np.cumsum(count) - count, count)
        owners.append(part.members[begin[index] + within] * heads + head[index])
        entries.append(place[index] + within * group)
    owner, entry = np.concatenate(owners), np.concatenate(entries)
    order = np.argsort(owner, kind="stable")
    return np.searchsorted(owner[order], np.arange(sequences * heads + 1)), entry[order]
