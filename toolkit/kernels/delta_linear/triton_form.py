"""Tiles of rows of one fine-tune; features are cut into parts where there would be too few programs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch

from toolkit.kernels.delta_linear import triton as kernels
from toolkit.kernels.delta_linear.api import BitDeltas
from toolkit.kernels.delta_linear.rows import rows_by_task
from toolkit.kernels.launch import GENERATIONS, Configuration, Table, generation_of, launch

TABLE = Table(Path(__file__).with_name("table.json"))

PROGRAMS_PER_MULTIPROCESSOR = 2
"""What there should be at least: one program alone waits for memory most of its time."""


def delta_linear(y_TN: torch.Tensor, x_TK: torch.Tensor, tasks: Sequence[int], deltas: BitDeltas) -> None:
    """See the api."""
    generation, (width, outputs) = generation_of(x_TK.device), (x_TK.shape[1], y_TN.shape[1])
    work = _plan(tuple(tasks), x_TK.itemsize, generation, x_TK.device)
    total, found = len(work.rows), work.configuration
    if not total:
        return
    blocks = -(-outputs // found.constants["BLOCK_N"])
    part_width = _part_width(width, len(work.items) * blocks, generation, found)
    parts = -(-width // part_width)
    scale, vector = deltas.scale_SN, deltas.vector_NK
    space = torch.empty(parts * (parts > 1), total, outputs, dtype=torch.float32, device=x_TK.device)
    common: dict[str, Any] = {
        "y_ptr": y_TN,
        "parts_ptr": space if parts > 1 else scale,
        "scale_ptr": scale,
        "rows_ptr": work.rows,
        "y_stride": y_TN.stride(0),
        "scale_stride": scale.stride(0),
        "scale_step": scale.stride(1) * (scale.shape[1] > 1),
        "outputs": outputs,
        "assignments": total,
    }
    own = {
        "x_ptr": x_TK,
        "bits_ptr": deltas.bits_SNB,
        "vector_ptr": scale if vector is None else vector,
        "items_ptr": work.items,
        "x_stride": x_TK.stride(0),
        "vector_stride": 0 if vector is None else vector.stride(0),
        "width": width,
        "row_bytes": deltas.bits_SNB.shape[2],
        "part_width": part_width,
    }
    constants = {**found.constants, "MASK": int(vector is not None), "WHOLE": int(parts == 1)}
    launch(kernels._multiply, (len(work.items), blocks, parts), common | own, replace(found, constants=constants))
    if parts > 1:
        add = TABLE.choose("_add", generation)
        grid = (total, -(-outputs // add.constants["BLOCK_N"]))
        launch(kernels._add, grid, common | {"tasks_ptr": work.tasks, "parts": parts}, add)


@dataclass(frozen=True)
class _Work:
    """Work lists on the device, int32, and what programs work on.

    Attributes:
        rows: `[E]`, row of each assignment, those of a fine-tune together.
        tasks: `[E]`, its fine-tune.
        items: `[*, 3]`: first assignment of a tile, assignments, fine-tune.
        configuration: of the product.
    """

    rows: torch.Tensor
    tasks: torch.Tensor
    items: torch.Tensor
    configuration: Configuration


@lru_cache(maxsize=16)
def _plan(tasks: tuple[int, ...], itemsize: int, generation: int, device: torch.device) -> _Work:
    """Divide the rows among tiles; all linears of a step share the lists."""
    groups = rows_by_task(tasks)
    sizes = {"rows": max(map(len, groups.values()), default=0), "bytes": itemsize}
    found = TABLE.choose("_multiply", generation, **sizes)
    block = found.constants["BLOCK_M"]
    rows: list[int] = []
    items: list[tuple[int, int, int]] = []
    for task, own in sorted(groups.items()):
        items += [(len(rows) + i, min(block, len(own) - i), task) for i in range(0, len(own), block)]
        rows += own
    on_device = partial(torch.tensor, dtype=torch.int32, device=device)
    return _Work(on_device(rows), on_device([tasks[row] for row in rows]), on_device(items), found)


def _part_width(width: int, programs: int, generation: int, configuration: Configuration) -> int:
    """Return how many features a program takes: as many as leave enough programs, in whole blocks."""
    block = configuration.constants["BLOCK_K"]
    blocks = -(-width // block)
    wanted = PROGRAMS_PER_MULTIPROCESSOR * GENERATIONS[generation].multiprocessors
    parts = -(-wanted // programs)
    return max(1, blocks // parts) * block
