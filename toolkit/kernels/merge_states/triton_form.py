"""One program per query and head, which reads each of its parts once."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from toolkit.kernels.launch import Table, generation_of, launch
from toolkit.kernels.merge_states import triton as kernels

TABLE = Table(Path(__file__).with_name("table.json"))


def merge_states(out_NTHD: torch.Tensor, lse_NTH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """See the api."""
    parts, queries, heads = lse_NTH.shape
    rows = torch.arange(parts * queries, dtype=torch.int32, device=out_NTHD.device)
    entries = rows.view(parts, queries).T.contiguous() * heads
    bounds = torch.arange(queries + 1, dtype=torch.int32, device=out_NTHD.device) * parts
    out_THD = torch.empty(out_NTHD.shape[1:], dtype=out_NTHD.dtype, device=out_NTHD.device)
    lse_TH = torch.empty(lse_NTH.shape[1:], dtype=lse_NTH.dtype, device=lse_NTH.device)
    merge_rows(out_NTHD.contiguous(), lse_NTH.contiguous(), out_THD, lse_TH, bounds, entries, heads)
    return out_THD, lse_TH


def merge_rows(
    parts: torch.Tensor,
    part_sums: torch.Tensor,
    out_THD: torch.Tensor,
    lse_TH: torch.Tensor,
    bounds: torch.Tensor,
    entries: torch.Tensor,
    group: int,
    sinks_H: torch.Tensor | None = None,
) -> None:
    """Merge any numbers of parts per query into outputs that are contiguous.

    Args:
        parts: `[*, D]`, one row per part, query and head, contiguous; the heads of a group follow one another.
        part_sums: `[*]`, their logarithms of sums.
        out_THD: written.
        lse_TH: written.
        bounds: `[T * H / group + 1]` int32, the first entry of each query and group of heads.
        entries: int32, the row of the first head of a group, in each of its parts.
        group: heads of a group.
        sinks_H: scores of further keys without a value.
    """
    queries, heads, size = out_THD.shape
    found = TABLE.choose("_merge", generation_of(parts.device), size=size)
    constants = {"GROUP": group, "SINKS": int(sinks_H is not None), "SIZE": size}
    arguments = {
        "part_ptr": parts,
        "part_lse_ptr": part_sums,
        "out_ptr": out_THD,
        "lse_ptr": lse_TH,
        "sinks_ptr": part_sums if sinks_H is None else sinks_H,
        "bounds_ptr": bounds,
        "entries_ptr": entries,
        "heads": heads,
    }
    launch(kernels._merge, (queries, heads), arguments, replace(found, constants={**found.constants, **constants}))
