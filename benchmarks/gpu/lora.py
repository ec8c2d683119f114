"""Grouped LoRA: decode and prefill of one group of linears, a whole decode step, and the backward pass."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise

import torch

from benchmarks.gpu.case import Case, Op, Run, Tensors, Work
from benchmarks.gpu.shapes import Shape
from toolkit.kernels.grouped_lora import PagedPairs, Pair, Routes, paged_lora, paged_lora_backward

PAGE = 4096
"""Elements of a page of the pool."""


@dataclass(frozen=True)
class Sizes:
    """Linears that read one input, and a batch.

    Attributes:
        width: K.
        widths: N of each linear.
        counts: rows of each adapter, one adapter after another.
        ranks: of each adapter.
        layers: as many groups of linears in one run, each with factors of its own.
    """

    width: int
    widths: tuple[int, ...]
    counts: tuple[int, ...]
    ranks: tuple[int, ...]
    layers: int = 1

    @property
    def rows(self) -> int:
        """Rows of the batch."""
        return sum(self.counts)

    @property
    def slots(self) -> list[int]:
        """Adapter of every row."""
        return [slot for slot, count in enumerate(self.counts) for _ in range(count)]


def inputs(sizes: Sizes, device: torch.device, dtype: torch.dtype) -> Tensors:
    """Make activations, outputs, and the factors of each adapter under each other."""

    def draw(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(shape, device=device) * scale).to(dtype)

    found = {"x": draw(sizes.rows, sizes.width)}
    for i, width in enumerate(sizes.widths):
        found[f"y{i}"] = draw(sizes.rows, width)
        found[f"a{i}"] = draw(sum(sizes.ranks), sizes.width, scale=sizes.width**-0.5)
        found[f"b{i}"] = draw(sum(sizes.ranks), width)
    return found


def factors(tensors: Tensors, sizes: Sizes, linear: int) -> list[Pair]:
    """Return the pair of every adapter at a linear."""
    bounds = pairwise([0, *accumulate(sizes.ranks)])
    return [Pair(tensors[f"a{linear}"][i:j], tensors[f"b{linear}"][i:j].T, scale=0.5) for i, j in bounds]


def place(tensors: Tensors, sizes: Sizes) -> PagedPairs:
    """Put all adapters into pages, in any order."""
    adapters = list(zip(*(factors(tensors, sizes, i) for i in range(len(sizes.widths))), strict=True))
    pool = tensors["x"].new_zeros(0, PAGE)
    needed = [PagedPairs(pool, sizes.width, sizes.widths, 1).pages_for(adapter) for adapter in adapters]
    order = torch.randperm(sum(needed)).tolist()
    pairs = PagedPairs(tensors["x"].new_zeros(len(order), PAGE), sizes.width, sizes.widths, len(adapters))
    for slot, (adapter, count) in enumerate(zip(adapters, needed, strict=True)):
        pairs.place(slot, adapter, [order.pop() for _ in range(count)])
    return pairs


def outputs(tensors: Tensors, sizes: Sizes) -> list[torch.Tensor]:
    """Return what is added to."""
    return [tensors[f"y{i}"] for i in range(len(sizes.widths))]


def bind(tensors: Tensors, sizes: Sizes, impl: str) -> Run:
    """Prepare the operation; layers after the first have copies of its factors elsewhere in memory."""
    routes, first, ys = Routes.of(sizes.slots), place(tensors, sizes), outputs(tensors, sizes)
    layers = [first]
    for _ in range(sizes.layers - 1):
        layers.append(copy.copy(first))
        layers[-1].pool = first.pool.clone()

    def run() -> list[torch.Tensor]:
        for pairs in layers:
            paged_lora(ys, tensors["x"], routes, pairs, impl=impl)  # type: ignore[arg-type]
        return ys

    return run


def others(tensors: Tensors, sizes: Sizes) -> Mapping[str, Run]:
    """Return batched products padded to the largest rank, or products per adapter, and the same product done dense."""
    if sizes.layers > 1:
        return {}
    ys = outputs(tensors, sizes)
    few = len(set(sizes.counts)) == 1 and sizes.counts[0] == 1
    pairs = [factors(tensors, sizes, i) for i in range(len(sizes.widths))]

    def per_adapter() -> list[torch.Tensor]:
        for start, (slot, count) in zip(accumulate((0, *sizes.counts)), enumerate(sizes.counts), strict=False):
            for y, own in zip(ys, pairs, strict=True):
                rows = slice(start, start + count)
                y[rows].addmm_(tensors["x"][rows] @ own[slot].a_rK.T, own[slot].b_Nr.T, alpha=0.5)
        return ys

    if not few:
        return {"eager": per_adapter, "dense": lambda: _dense(tensors, sizes, pairs[0][0])}
    most = max(sizes.ranks)
    stacks = [[_padded([p.a_rK for p in own], most), _padded([p.b_Nr.T for p in own], most)] for own in pairs]

    def batched() -> list[torch.Tensor]:
        for y, (a_SrK, b_SrN) in zip(ys, stacks, strict=True):
            inner = torch.bmm(tensors["x"][:, None], a_SrK.transpose(1, 2))
            y[:, None].baddbmm_(inner, b_SrN, alpha=0.5)
        return ys

    return {"eager": batched}


def _padded(matrices: list[torch.Tensor], rank: int) -> torch.Tensor:
    return torch.stack([torch.nn.functional.pad(m, (0, 0, 0, rank - len(m))) for m in matrices])


def _dense(tensors: Tensors, sizes: Sizes, pair: Pair) -> list[torch.Tensor]:
    """Let one adapter, of the first linear, work on all rows."""
    return [tensors["y0"].addmm_(tensors["x"] @ pair.a_rK.T, pair.b_Nr.T, alpha=0.5)]


def work(sizes: Sizes, itemsize: int) -> Work:
    """Factors once, the input once, outputs read and written."""
    features = sum(sizes.width + width for width in sizes.widths)
    numbers = sum(sizes.ranks) * features + sizes.rows * (sizes.width + 2 * sum(sizes.widths))
    products = sum(count * rank for count, rank in zip(sizes.counts, sizes.ranks, strict=True))
    return Work(sizes.layers * numbers * itemsize, sizes.layers * 2 * products * features)


def bind_backward(tensors: Tensors, sizes: Sizes, impl: str) -> Run:
    """Prepare the gradients of the input and of all factors."""
    routes, pairs = Routes.of(sizes.slots), place(tensors, sizes)
    elements = [t.reshape(-1) for i in range(len(sizes.widths)) for t in pairs.elements(0, i)]

    def run() -> list[torch.Tensor]:
        dx, dpool = paged_lora_backward(outputs(tensors, sizes), tensors["x"], routes, pairs, impl=impl)  # type: ignore[arg-type]
        return [dx, *(dpool.view(-1)[own].view(1, -1) for own in elements)]

    return run


def backward_others(tensors: Tensors, sizes: Sizes) -> Mapping[str, Run]:
    """Return products per adapter."""
    ys = outputs(tensors, sizes)
    pairs = [factors(tensors, sizes, i) for i in range(len(ys))]

    def run() -> list[torch.Tensor]:
        dx, first = torch.zeros_like(tensors["x"]), []
        for slot, (start, stop) in enumerate(pairwise(accumulate((0, *sizes.counts)))):
            x = tensors["x"][start:stop]
            for dy, own in zip(ys, pairs, strict=True):
                dinner = dy[start:stop] @ own[slot].b_Nr * 0.5
                dx[start:stop].addmm_(dinner, own[slot].a_rK)
                da, db = dinner.T @ x, dy[start:stop].T @ (x @ own[slot].a_rK.T * 0.5)
                first += [da.reshape(1, -1), db.reshape(1, -1)] if slot == 0 else []
        return [dx, *first]

    return {"eager": run}


def backward_work(sizes: Sizes, itemsize: int) -> Work:
    """Forward's shrink again, and twice as many products as forward; gradients of factors are float32."""
    own = work(sizes, itemsize)
    written = 4 * sum(sizes.ranks) * sum(sizes.width + width for width in sizes.widths)
    return Work(own.bytes + written, 5 * own.operations // 2)


SMALL = [
    Sizes(300, (80, 48, 33), (1, 1, 3, 20, 1), (1, 8, 17, 16, 64)),
    Sizes(64, (130,), (1,) * 6, (5, 16, 3, 64, 8, 1)),
]
GROUPED = Op("grouped_lora", inputs, bind, others, work, SMALL)
BACKWARD = Op(
    "grouped_lora backward", inputs, bind_backward, backward_others, backward_work, SMALL[:1], False, whole=True
)


def cases(shape: Shape, *, batch: int = 64, prompt: int = 4096) -> list[Case]:
    """Return what is measured of a model.

    Args:
        shape: the model.
        batch: rows of a decode step, each with an adapter of its own.
        prompt: rows of a prefill, of four adapters.
    """
    ones, mixed = (1,) * batch, tuple((8, 16, 16, 64)[i % 4] for i in range(batch))
    found = []
    for name, (width, widths) in shape.groups.items():
        sizes = Sizes(width, widths, ones, (16,) * batch)
        found.append(Case(GROUPED, f"{shape.name} decode, {name}, {batch} x rank 16", sizes, cold=True))
    width, widths = shape.groups["q k v"]
    decode = Sizes(width, widths, ones, mixed)
    found.append(Case(GROUPED, f"{shape.name} decode, q k v, ranks 8 to 64", decode, cold=True))
    few = replace(decode, counts=(batch // 4,) * 4, ranks=(16,) * 4)
    found.append(Case(GROUPED, f"{shape.name} decode, q k v, 4 adapters", few, cold=True))
    for rank in (16, 64):
        sizes = Sizes(width, widths, (prompt // 4,) * 4, (rank,) * 4)
        found.append(Case(GROUPED, f"{shape.name} prefill, q k v, 4 x rank {rank}", sizes, goal="60% of dense"))
    found.append(Case(BACKWARD, f"{shape.name} training, q k v, 4 x rank 16", replace(sizes, ranks=(16,) * 4)))
    return found


def step_cases(shape: Shape, *, batch: int = 64) -> list[Case]:
    """Return the four groups of linears, all layers of each in one run: together the LoRA part of a decode step."""
    return [
        Case(GROUPED, f"{shape.name} step, {name}", Sizes(width, widths, (1,) * batch, (16,) * batch, shape.layers))
        for name, (width, widths) in shape.groups.items()
    ]
