"""Work lists of blocks of rows and of keys, and the launches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from toolkit.kernels.launch import Configuration, Table, generation_of, launch
from toolkit.kernels.prefill_attention import triton as kernels
from toolkit.kernels.scoring import Scoring

TABLE = Table(Path(__file__).with_name("table.json"))

NO_WINDOW = 2**30
"""A window that reaches everything."""

Item = tuple[int, int, int, int, int]
"""Of a sequence: first query token, rows (query tokens times heads of a group), position of the first query, number of
keys, and its block table or first key."""


def prefill_attention(
    q_THD: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    starts: list[int],
    lengths: list[int],
    tables: torch.Tensor,
    positions: list[int],
    scoring: Scoring,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See the api."""
    group = q_THD.shape[1] // k_cache.shape[2]
    sequences = list_sequences(starts, lengths, positions, range(len(lengths)), group)
    return forward(q_THD, k_cache, v_cache, sequences, scoring, tables)


def list_sequences(
    starts: Sequence[int], lengths: Sequence[int], positions: Sequence[int], places: Sequence[int], group: int
) -> tuple[Item, ...]:
    """Return what the kernels need to know of each sequence."""
    rows = [(stop - start) * group for start, stop in pairwise(starts)]
    return tuple(zip(starts[:-1], rows, positions, lengths, places, strict=True))


def forward(
    q_THD: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    sequences: tuple[Item, ...],
    scoring: Scoring,
    tables: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend over pages, or over packed keys and values if there are no tables."""
    out_THD = torch.empty(q_THD.shape, dtype=q_THD.dtype, device=q_THD.device)
    lse_TH = torch.empty(q_THD.shape[:2], dtype=torch.float32, device=q_THD.device)
    found = configuration("_forward", q_THD, k, sequences, scoring)
    constants = {"PAGE": 0 if tables is None else k.shape[1], "SINKS": int(scoring.sinks_H is not None)}
    arguments = common(q_THD, k, v, scoring) | {
        "out_ptr": out_THD,
        "lse_ptr": lse_TH,
        "sinks_ptr": lse_TH if scoring.sinks_H is None else scoring.sinks_H,
        "tables_ptr": lse_TH if tables is None else tables,
        "items_ptr": row_blocks(sequences, found.constants["BLOCK_M"], found.constants["GROUP"], q_THD.device),
        "table_stride": 0 if tables is None else tables.stride(0),
        "k_page_stride": k.stride(0),
        "v_page_stride": v.stride(0),
    }
    grid = (len(arguments["items_ptr"]), k.shape[-2])
    launch(kernels._forward, grid, arguments, replace(found, constants={**found.constants, **constants}))
    return out_THD, lse_TH


def configuration(
    kernel: str, q_THD: torch.Tensor, k: torch.Tensor, sequences: tuple[Item, ...], scoring: Scoring
) -> Configuration:
    """Return what a kernel is compiled with, for heads of some size and sequences of some numbers of rows."""
    size, rows = q_THD.shape[2], max((sequence[1] for sequence in sequences), default=0)
    found = TABLE.choose(kernel, generation_of(q_THD.device), size=size, rows=rows, bytes=q_THD.itemsize)
    constants = {"GROUP": q_THD.shape[1] // k.shape[-2], "SIZE": size, "CAPPED": int(scoring.soft_cap is not None)}
    return replace(found, constants={**found.constants, **constants})


def common(q_THD: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scoring: Scoring) -> dict[str, Any]:
    """Return the arguments that all kernels take."""
    return {
        "q_ptr": q_THD,
        "k_ptr": k,
        "v_ptr": v,
        "q_stride": q_THD.stride(0),
        "q_head_stride": q_THD.stride(1),
        "k_stride": k.stride(-3),
        "k_head_stride": k.stride(-2),
        "v_stride": v.stride(-3),
        "v_head_stride": v.stride(-2),
        "heads": q_THD.shape[1],
        "scale": float(scoring.scale),
        "soft_cap": float(scoring.soft_cap or 1.0),
        "window": NO_WINDOW if scoring.window is None else min(scoring.window, NO_WINDOW),
        "num_global": scoring.num_global,
    }


@lru_cache(maxsize=16)
def row_blocks(sequences: tuple[Item, ...], block: int, group: int, device: torch.device) -> torch.Tensor:
    """Return an item for each block of rows; all layers of a step share the list.

    Those that see most keys come first, so that none of them is left alone at the end.
    """
    items = [(*sequence, row) for sequence in sequences for row in range(0, sequence[1], block)]
    items.sort(key=lambda item: -min(item[3], item[2] + item[5] // group))
    return torch.tensor(items, dtype=torch.int32, device=device).view(-1, 6)


@lru_cache(maxsize=16)
def key_blocks(sequences: tuple[Item, ...], block: int, device: torch.device) -> torch.Tensor:
    """Return an item for each block of keys, in the order of the keys: the first are seen by most rows."""
    items = [(*sequence, key) for sequence in sequences for key in range(0, sequence[3], block)]
    return torch.tensor(items, dtype=torch.int32, device=device).view(-1, 6)
