"""One launch for what sequences have alone, one for what they share, and one that merges the partial states of both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from toolkit.kernels.decode_attention import triton as kernels
from toolkit.kernels.decode_attention.api import SharedPrefix
from toolkit.kernels.decode_attention.caches import Cache, PlainCache
from toolkit.kernels.decode_attention.plan import FixedLengths, Pieces, Span, divide, list_spans, merge_lists
from toolkit.kernels.fixed import FixedLists, Room
from toolkit.kernels.launch import GENERATIONS, Configuration, Table, generation_of, launch
from toolkit.kernels.merge_states.triton_form import merge_rows
from toolkit.kernels.scoring import Scoring

TABLE = Table(Path(__file__).with_name("table.json"))

PROGRAMS_PER_MULTIPROCESSOR = 2
"""One program alone waits for memory most of its time."""


def decode_attention(
    q_SHD: torch.Tensor,
    cache: Cache,
    lengths: list[int],
    tables: torch.Tensor,
    scoring: Scoring,
    prefixes: Sequence[SharedPrefix],
) -> tuple[torch.Tensor, torch.Tensor]:
    """See the api."""
    out_SHD = torch.empty(q_SHD.shape, dtype=q_SHD.dtype, device=q_SHD.device)
    lse_SH = torch.empty(q_SHD.shape[:2], dtype=torch.float32, device=q_SHD.device)
    seen, heads = Scoring(1.0, scoring.window, scoring.num_global), _Heads.of(q_SHD, cache)
    if isinstance(lengths, FixedLengths):
        if prefixes:
            raise ValueError("lengths that change in place have no shared prefixes")
        work = _fixed_plan(lengths, seen, heads, q_SHD.device)
    else:
        work = _plan(tuple(lengths), tuple(prefixes), seen, heads, q_SHD.device)
    parts = torch.empty(work.rows, q_SHD.shape[2], dtype=torch.float32, device=q_SHD.device)
    sums = torch.empty(work.rows, dtype=torch.float32, device=q_SHD.device)
    arguments = _arguments(q_SHD, cache, tables, scoring) | {"out_ptr": parts, "lse_ptr": sums}
    for one in work.launches:
        constants = {"CAPPED": int(scoring.soft_cap is not None)}
        configuration = replace(one.configuration, constants={**one.configuration.constants, **constants})
        lists = {"members_ptr": one.members, "bounds_ptr": one.bounds, "pieces_ptr": one.pieces}
        launch(kernels._attend, (len(one.bounds) - 1,), arguments | lists, configuration)
    group = q_SHD.shape[1] // cache.heads
    merge_rows(parts, sums, out_SHD, lse_SH, work.bounds, work.entries, group, scoring.sinks_H)
    return out_SHD, lse_SH


@dataclass(frozen=True)
class _Heads:
    """What decides how work is divided and kernels are compiled."""

    heads: int
    group: int
    size: int
    itemsize: int
    page: int
    bits: int

    @classmethod
    def of(cls, q_SHD: torch.Tensor, cache: Cache) -> _Heads:
        bits = 0 if isinstance(cache, PlainCache) else cache.bits
        group = q_SHD.shape[1] // cache.heads
        return cls(cache.heads, group, q_SHD.shape[2], q_SHD.itemsize, cache.page, bits)

    def configuration(self, generation: int, members: int) -> Configuration:
        """Return what the kernel is compiled with for spans of at most so many members."""
        found = TABLE.choose(
            "_attend", generation, size=self.size, bytes=self.itemsize, rows=members * self.group, bits=self.bits
        )
        own = {"GROUP": self.group, "SIZE": self.size, "PAGE": self.page, "BITS": self.bits}
        own["BLOCK_M"] = max(found.constants["BLOCK_M"], 1 << (self.group - 1).bit_length())
        if self.bits:
            own["BLOCK_N"] = min(found.constants["BLOCK_N"], self.page)
        return replace(found, constants={**found.constants, **own})


@dataclass(frozen=True)
class _Launch:
    """The work lists of one launch, on the device."""

    members: torch.Tensor
    bounds: torch.Tensor
    pieces: torch.Tensor
    configuration: Configuration


@dataclass(frozen=True)
class _Work:
    """The work lists of a decode step."""

    launches: list[_Launch]
    bounds: torch.Tensor
    entries: torch.Tensor
    rows: int


@lru_cache(maxsize=16)
def _plan(
    lengths: tuple[int, ...], prefixes: tuple[SharedPrefix, ...], seen: Scoring, heads: _Heads, device: torch.device
) -> _Work:
    """Divide the work; all layers of a step that see the same tokens share the lists."""
    generation = generation_of(device)
    parts: list[Pieces] = []
    launches: list[_Launch] = []
    for spans in list_spans(lengths, prefixes, seen):
        if spans:
            configuration = heads.configuration(generation, max(len(span.members) for span in spans))
            found = _divided(spans, heads, configuration, generation, sum(part.rows for part in parts))
            parts.append(found)
            members, cuts, pieces = (_on(device, array) for array in (found.members, found.bounds, found.pieces))
            launches.append(_Launch(members, cuts, pieces, configuration))
    bounds, entries = merge_lists(parts, len(lengths), heads.heads, heads.group)
    return _Work(launches, _on(device, bounds), _on(device, entries), sum(part.rows for part in parts))


def _divided(
    spans: Sequence[Span], heads: _Heads, configuration: Configuration, generation: int, first_row: int = 0
) -> Pieces:
    blocks = configuration.constants
    spans = _cut(spans, blocks["BLOCK_M"] // heads.group)
    return divide(spans, heads.heads, heads.group, blocks["BLOCK_N"], _programs(generation), first_row)


def _programs(generation: int) -> int:
    return PROGRAMS_PER_MULTIPROCESSOR * GENERATIONS[generation].multiprocessors


def _fixed_plan(lengths: FixedLengths, seen: Scoring, heads: _Heads, device: torch.device) -> _Work:
    """Return lists that follow the lengths: programs without a piece are the same number of programs."""
    generation = generation_of(device)
    configuration = heads.configuration(generation, 1)
    programs = _programs(generation)
    spans = len(lengths) * (2 if seen.window is not None and seen.num_global else 1)
    most = programs + spans * heads.heads  # a span of a head is cut where programs change

    def make() -> dict[str, np.ndarray]:
        found = _divided(list_spans(lengths, (), seen)[1], heads, configuration, generation)
        bounds, entries = merge_lists([found], len(lengths), heads.heads, heads.group)
        own = {"members": found.members, "cuts": found.bounds, "pieces": found.pieces}
        return {**own, "bounds": bounds, "entries": entries}

    if (seen, heads) not in lengths.lists:
        rooms = {"members": Room(spans), "cuts": Room(programs + 1), "pieces": Room(most, 7)}
        rooms |= {"bounds": Room(len(lengths) * heads.heads + 1), "entries": Room(most)}
        lengths.lists[seen, heads] = FixedLists(rooms, make, device)
    lists = lengths.lists[seen, heads].tensors
    own = _Launch(lists["members"], lists["cuts"], lists["pieces"], configuration)
    return _Work([own], lists["bounds"], lists["entries"], most * heads.group)


def _cut(spans: Sequence[Span], most: int) -> list[Span]:
    """Divide the members of spans, so that none has more than a program takes at once."""
    return [
        replace(span, members=span.members[i : i + most]) for span in spans for i in range(0, len(span.members), most)
    ]


def _on(device: torch.device, array: Any) -> torch.Tensor:
    return torch.tensor(array, dtype=torch.int32, device=device)


def _arguments(q_SHD: torch.Tensor, cache: Cache, tables: torch.Tensor, scoring: Scoring) -> dict[str, Any]:
    plain = isinstance(cache, PlainCache)
    k, v = (cache.k, cache.v) if plain else (cache.k_codes, cache.v_codes)
    names = ("k_scale", "k_low", "v_scale", "v_low")
    return {
        "q_ptr": q_SHD,
        "k_ptr": k,
        "v_ptr": v,
        **{f"{name}_ptr": q_SHD if plain else getattr(cache, name) for name in names},
        "tables_ptr": tables,
        "q_stride": q_SHD.stride(0),
        "q_head_stride": q_SHD.stride(1),
        **dict(zip(("k_page_stride", "k_stride", "k_head_stride"), k.stride(), strict=False)),
        **dict(zip(("v_page_stride", "v_stride", "v_head_stride"), v.stride(), strict=False)),
        "table_stride": tables.stride(0),
        "heads": cache.heads,
        "scale": float(scoring.scale),
        "soft_cap": float(scoring.soft_cap or 1.0),
    }
