"""Two launches for all rows: inner products with A, then their products with B, each read once from its pages.

Rows that are alone with their adapter take the row form: a program streams one tile of factors at full width. Others
take the tile form on tensor cores. K is cut into parts so that there are at least two programs per multiprocessor.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from toolkit.kernels.grouped_lora import triton as kernels
from toolkit.kernels.grouped_lora.pages import PagedPairs
from toolkit.kernels.grouped_lora.routes import Blocks, Plan, Routes
from toolkit.kernels.launch import GENERATIONS, Configuration, Table, generation_of, launch

TABLE = Table(Path(__file__).with_name("table.json"))

PROGRAMS_PER_MULTIPROCESSOR = 2
"""What there should be at least: one program alone waits for memory most of its time."""


def paged_lora(
    ys: Sequence[torch.Tensor],
    x: torch.Tensor,
    routes: Routes,
    pairs: PagedPairs,
    biases: Sequence[torch.Tensor | None],
) -> None:
    """See the api."""
    work = Work.of(routes, pairs, x.device, embedding=x.dim() == 1)
    if work.plan.size:
        inner = _look_up(x, work) if x.dim() == 1 else shrink(x, work)
        expand(ys, inner, work, biases)


def paged_lora_backward(
    dys: Sequence[torch.Tensor], x_TK: torch.Tensor, routes: Routes, pairs: PagedPairs
) -> tuple[torch.Tensor, torch.Tensor]:
    """See the api. The same kernels with the sides in turn, and one for the gradients of the factors."""
    work = Work.of(routes, pairs, x_TK.device)
    dx_TK, dpool = torch.zeros_like(x_TK), torch.zeros_like(pairs.pool, dtype=torch.float32)
    if not work.plan.size:
        return dx_TK, dpool
    inner = shrink(x_TK, work)
    parts = max(max(work.parts(side)) for side in range(1, len(pairs.widths)))
    # Linears of different widths have different numbers of parts; what is not written must add nothing.
    back = Inner(torch.zeros(parts, work.plan.size, dtype=torch.float32, device=x_TK.device), parts, parts)
    for side, dy in enumerate(dys, 1):
        shrink(dy, work, side, back)
        _outer(dy, inner, work, side, dpool)
    _outer(x_TK, back, work, 0, dpool)
    expand([dx_TK], back, work, [None], backward=True)
    return dx_TK, dpool


@dataclass(frozen=True)
class Inner:
    """Inner products `[parts, size]`, float32; a row that is alone with its adapter has `row_parts` of them."""

    values: torch.Tensor
    row_parts: int
    tile_parts: int


@dataclass(frozen=True)
class Work:
    """The work lists of a batch, its weights, `[P, E]` or `[1, E]`, and how its kernels are configured."""

    pairs: PagedPairs
    plan: Plan
    blocks: Blocks
    generation: int
    rows: int
    weights: torch.Tensor

    @classmethod
    def of(cls, routes: Routes, pairs: PagedPairs, device: torch.device, *, embedding: bool = False) -> Work:
        """Choose what programs work on by the largest group of rows, and make the lists."""
        generation, rows = generation_of(device), routes.largest_group
        sizes = {"rows": rows, "width": pairs.widths[0], "bytes": pairs.pool.itemsize}
        row = TABLE.choose("_shrink_token" if embedding else "_shrink_row", generation, **sizes).constants
        tile = TABLE.choose("_shrink_tile", generation, **sizes).constants
        blocks = Blocks(row["BLOCK_R"], tile["BLOCK_M"], tile["BLOCK_R"], embedding)
        plan = routes.plan(pairs.ranks, blocks, device)
        mixture = routes.mixture
        weights = plan.weights[None] if mixture is None else mixture.flatten(1).float()[:, plan.choices.flatten()]
        return cls(pairs, plan, blocks, generation, rows, weights)

    def configuration(self, kernel: str, width: int, **constants: int) -> Configuration:
        """Return a kernel's configuration for features of some width; no block of features exceeds a page."""
        sizes = {"rows": self.rows, "width": width, "bytes": self.pairs.pool.itemsize}
        found, page = TABLE.choose(kernel, self.generation, **sizes), self.pairs.page
        own = {n: min(v, page) if n in ("BLOCK_K", "BLOCK_N") else v for n, v in found.constants.items()}
        return replace(found, constants={**own, "PAGE": page, **constants})

    def shrink_configurations(self, width: int) -> tuple[Configuration, Configuration]:
        """Return those of rows and of tiles."""
        tile = {"BLOCK_M": self.blocks.tile_rows, "BLOCK_R": self.blocks.tile_ranks}
        return (
            self.configuration("_shrink_row", width, BLOCK_R=self.blocks.row_ranks),
            self.configuration("_shrink_tile", width, **tile),
        )

    def part_width(self, width: int) -> int:
        """Return how many features a program of tiles takes: as many as leave enough programs, at most all.

        A power of two of blocks that divides a page, or whole pages.
        """
        block, page = self.shrink_configurations(width)[1].constants["BLOCK_K"], self.pairs.page
        wanted = PROGRAMS_PER_MULTIPROCESSOR * GENERATIONS[self.generation].multiprocessors
        most = width * len(self.plan.shrink_tiles) // wanted
        if most >= page:
            return most // page * page
        return max(block, 1 << max(0, most.bit_length() - 1))

    def parts(self, side: int) -> tuple[int, int]:
        """Return into how many parts the features of a side are cut, for rows and for tiles; 0 where there are none."""
        width = self.pairs.widths[side]
        block = self.shrink_configurations(width)[0].constants["BLOCK_K"]
        rows, tiles = -(-width // block), -(-width // self.part_width(width))
        return rows * bool(len(self.plan.shrink_rows)), tiles * bool(len(self.plan.shrink_tiles))

    def arguments(self, **more: Any) -> dict[str, Any]:
        """Return what all kernels take, and more."""
        pairs, plan = self.pairs, self.plan
        common = {"offsets_ptr": pairs.offsets, "slots": pairs.num_slots, "rows_ptr": plan.rows}
        return {**common, "places_ptr": plan.places, **more}


def shrink(x: torch.Tensor, work: Work, side: int = 0, into: Inner | None = None) -> Inner:
    """Multiply the row of `x`, `[T, width of the side]`, of every assignment with the rank rows of a side."""
    pairs, plan, width = work.pairs, work.plan, work.pairs.widths[side]
    row_parts, tile_parts = work.parts(side)
    if into is None:
        size = (max(row_parts, tile_parts), plan.size)
        into = Inner(torch.empty(size, dtype=torch.float32, device=x.device), row_parts, tile_parts)
    arguments = work.arguments(
        x_ptr=x,
        h_ptr=into.values,
        pool_ptr=pairs.pool,
        side_ptr=pairs.sides[side],
        scale_ptr=pairs.scales[side],
        x_stride=x.stride(0),
        width=width,
        pieces=pairs.pieces(width),
        size=plan.size,
    )
    row, tile = work.shrink_configurations(width)
    # On side 0, A, the scales are 1; backward each linear's own is needed before its gradient meets the others'.
    launch(kernels._shrink_row, (len(plan.shrink_rows), row_parts), arguments | {"items_ptr": plan.shrink_rows}, row)
    own = {"items_ptr": plan.shrink_tiles, "part_width": work.part_width(width)}
    launch(kernels._shrink_tile, (len(plan.shrink_tiles), tile_parts), arguments | own, tile)
    return into


def _look_up(tokens: torch.Tensor, work: Work) -> Inner:
    """Take the tokens' columns of A as inner products."""
    pairs, plan = work.pairs, work.plan
    values = torch.empty(1, plan.size, dtype=torch.float32, device=tokens.device)
    arguments = work.arguments(
        tokens_ptr=tokens,
        h_ptr=values,
        pool_ptr=pairs.pool,
        side_ptr=pairs.sides[0],
        items_ptr=plan.shrink_rows,
        token_stride=tokens.stride(0),
        pieces=pairs.pieces(pairs.widths[0]),
    )
    launch(
        kernels._shrink_token,
        (len(plan.shrink_rows),),
        arguments,
        work.configuration("_shrink_token", pairs.widths[0], BLOCK_R=work.blocks.row_ranks),
    )
    return Inner(values, 1, 0)


def expand(
    ys: Sequence[torch.Tensor],
    inner: Inner,
    work: Work,
    biases: Sequence[torch.Tensor | None],
    *,
    backward: bool = False,
) -> None:
    """Add inner products times rank rows to outputs: of all linears, or backward to the gradient of their input."""
    pairs, plan = work.pairs, work.plan
    widths = [y.shape[1] for y in ys]
    sides = slice(0, 1) if backward else slice(1, None)
    extras = not backward and bool(pairs.has_extras[plan.slots].any())
    arguments = work.arguments(
        **{f"y{i}_ptr": ys[min(i, len(ys) - 1)] for i in range(3)},
        **{f"bias{i}_ptr": _or(biases, i, pairs.pool) for i in range(3)},
        **{f"y{i}_stride": ys[i].stride(0) if i < len(ys) else 0 for i in range(3)},
        **{f"width{i}": widths[i] if i < len(ys) else 0 for i in range(3)},
        h_ptr=inner.values,
        pool_ptr=pairs.pool,
        sides_ptr=pairs.sides[sides],
        scales_ptr=pairs.scales[sides],
        extras_ptr=pairs.extras,
        weights_ptr=work.weights,
        weights_stride=work.weights.stride(0) if len(work.weights) > 1 else 0,
        single_ptr=plan.single,
        size=plan.size,
        row_parts=inner.row_parts,
        tile_parts=inner.tile_parts,
        biases=sum((bias is not None) << i for i, bias in enumerate(biases)),
    )
    row = work.configuration("_expand_row", max(widths), EXTRAS=int(extras))
    tile = work.configuration("_expand_tile", max(widths), EXTRAS=int(extras), BLOCK_M=work.blocks.tile_rows)
    row_blocks, tile_blocks = (sum(-(-n // c.constants["BLOCK_N"]) for n in widths) for c in (row, tile))
    rows = arguments | {"items_ptr": plan.expand_rows}
    launch(kernels._expand_row, (len(plan.expand_rows), row_blocks), rows, row)
    del arguments["rows_ptr"]
    tiles = {"bounds_ptr": plan.tile_bounds, "tile_rows_ptr": plan.tile_rows, "entries_ptr": plan.entries}
    launch(kernels._expand_tile, (len(plan.tile_rows), tile_blocks), arguments | tiles, tile)


def _or(tensors: Sequence[torch.Tensor | None], index: int, other: torch.Tensor) -> torch.Tensor:
    found = tensors[index] if index < len(tensors) else None
    return other if found is None else found


def _outer(values: torch.Tensor, inner: Inner, work: Work, side: int, into: torch.Tensor) -> None:
    """Write the gradient of a side's factors, inner products times the rows of `values`, into pages like theirs."""
    pairs, plan, width = work.pairs, work.plan, work.pairs.widths[side]
    configuration = work.configuration("_outer", width)
    arguments = work.arguments(
        values_ptr=values,
        h_ptr=inner.values,
        grad_ptr=into,
        side_ptr=pairs.sides[side],
        scale_ptr=pairs.scales[side],
        groups_ptr=plan.groups,
        weights_ptr=plan.weights,
        single_ptr=plan.single,
        stride=values.stride(0),
        width=width,
        size=plan.size,
        row_parts=inner.row_parts,
        tile_parts=inner.tile_parts,
    )
    ranks = -(-int(pairs.ranks[plan.slots].max()) // configuration.constants["BLOCK_R"])
    grid = (len(plan.groups), ranks, -(-width // configuration.constants["BLOCK_N"]))
    launch(kernels._outer, grid, arguments, configuration)
