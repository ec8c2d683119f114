"""Fine-tunes of a bit per weight, and merging of weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from benchmarks.gpu.case import Case, Op, Run, Tensors, Work
from benchmarks.gpu.shapes import Shape
from toolkit.kernels.delta_linear import BitDeltas, delta_linear
from toolkit.kernels.delta_linear.bits import expand
from toolkit.kernels.merge_elementwise import KeptAtRandom, KeptLargest, Vote, merge_elementwise
from toolkit.kernels.merge_elementwise.api import BLOCK


@dataclass(frozen=True)
class Linear:
    """A linear, fine-tunes of it and a batch.

    Attributes:
        width: K.
        outputs: N.
        counts: rows of each fine-tune, one after another.
        mask: bits are masks of a vector that all share, else signs.
    """

    width: int
    outputs: int
    counts: tuple[int, ...]
    mask: bool

    @property
    def tasks(self) -> list[int]:
        """Fine-tune of every row."""
        return [task for task, count in enumerate(self.counts) for _ in range(count)]


def linear_inputs(sizes: Linear, device: torch.device, dtype: torch.dtype) -> Tensors:
    """Make activations, outputs, bits, scales and the vector."""
    rows, tasks, shape = len(sizes.tasks), len(sizes.counts), (sizes.outputs, sizes.width)
    packed = (tasks, sizes.outputs, -(-sizes.width // 8))
    return {
        "x": torch.randn(rows, sizes.width, device=device).to(dtype),
        "y": torch.randn(rows, sizes.outputs, device=device).to(dtype),
        "bits": torch.randint(0, 256, packed, dtype=torch.uint8, device=device),
        "scale": torch.rand(tasks, sizes.outputs, device=device) * sizes.width**-0.5,
        **({"vector": torch.randn(shape, device=device).to(dtype)} if sizes.mask else {}),
    }


def _deltas(tensors: Tensors) -> BitDeltas:
    return BitDeltas(tensors["bits"], tensors["scale"], tensors.get("vector"))


def bind_linear(tensors: Tensors, sizes: Linear, impl: Any) -> Run:
    """Prepare the operation."""
    deltas = _deltas(tensors)

    def run() -> list[torch.Tensor]:
        delta_linear(tensors["y"], tensors["x"], sizes.tasks, deltas, impl=impl)
        return [tensors["y"]]

    return run


def linear_others(tensors: Tensors, sizes: Linear) -> Mapping[str, Run]:
    """Return products with weights that are written out, each time."""
    x, y, scale = tensors["x"], tensors["y"], tensors["scale"].to(tensors["x"].dtype)

    def run() -> list[torch.Tensor]:
        start = 0
        for task, count in enumerate(sizes.counts):
            weight = expand(tensors["bits"][task], tensors.get("vector"), sizes.width, x.dtype) * scale[task, :, None]
            y[start : start + count] += x[start : start + count] @ weight.T
            start += count
        return [y]

    return {"eager": run}


def linear_work(sizes: Linear, itemsize: int) -> Work:
    """The bits of each fine-tune and the vector once, inputs once, outputs read and written."""
    rows, weights = sum(sizes.counts), sizes.outputs * sizes.width
    read = len(sizes.counts) * weights // 8 + weights * itemsize * sizes.mask
    return Work(read + rows * (sizes.width + 2 * sizes.outputs) * itemsize, 2 * rows * weights)


@dataclass(frozen=True)
class Merge:
    """Models to be merged.

    Attributes:
        elements: of each.
        method: `linear`, `ties` or `dare`.
        models: how many.
    """

    elements: int
    method: str
    models: int = 3


def merge_inputs(sizes: Merge, device: torch.device, dtype: torch.dtype) -> Tensors:
    """Make deltas and a base in float32, as a merge holds them on a device, and keys of random numbers."""
    blocks = -(-sizes.elements // BLOCK)
    return {
        "x": torch.randn(sizes.models, sizes.elements, device=device),
        "base": torch.randn(sizes.elements, device=device),
        "keys": torch.randint(-(2**31), 2**31, (sizes.models, blocks, 2), device=device).to(torch.int32),
    }


def bind_merge(tensors: Tensors, sizes: Merge, impl: Any) -> Run:
    """Prepare the operation."""
    models = sizes.models
    options: dict[str, Any] = {"impl": impl, "base_N": tensors["base"]}
    if sizes.method == "ties":
        half = int(torch.tensor(0.7).view(torch.int32))
        options |= {"kept": KeptLargest([half] * models, [sizes.elements] * models), "vote": Vote()}
    if sizes.method == "dare":
        options |= {"kept": KeptAtRandom(tensors["keys"], [2**31] * models, [2.0] * models)}
    weights = [0.3 + 0.1 * i for i in range(models)]
    return lambda: [merge_elementwise(tensors["x"], weights, **options)[None]]


def merge_others(tensors: Tensors, sizes: Merge) -> Mapping[str, Run]:
    """Return torch's steps one by one."""
    return {"eager": bind_merge(tensors, sizes, "reference")}


def merge_work(sizes: Merge, itemsize: int) -> Work:
    """Models, base and result once each, float32."""
    return Work((sizes.models + 2) * sizes.elements * 4)


_SMALL = Linear(300, 77, (1, 3, 20, 1), mask=True)
DELTA = Op(
    "delta_linear", linear_inputs, bind_linear, linear_others, linear_work, [_SMALL, replace(_SMALL, mask=False)]
)
MERGED = Op(
    "merge_elementwise", merge_inputs, bind_merge, merge_others, merge_work,
    [Merge(3001, method) for method in ("linear", "ties", "dare")], exact=True,
)  # fmt: skip


def cases(shape: Shape, *, batch: int = 64, prompt: int = 4096) -> list[Case]:
    """Return what is measured of a model's `up_proj`.

    Args:
        shape: the model.
        batch: rows of a decode step, of eight fine-tunes.
        prompt: rows of a prefill, of four fine-tunes.
    """
    found = []
    for mask, name in ((True, "masks"), (False, "signs")):
        decode = Linear(shape.hidden, shape.inner, (max(1, batch // 8),) * 8, mask)
        prefill = replace(decode, counts=(prompt // 4,) * 4)
        found.append(Case(DELTA, f"{shape.name} decode, up, 8 {name}", decode, cold=True))
        found.append(Case(DELTA, f"{shape.name} prefill, up, 4 {name}", prefill))
    return found


def merge_cases(*, elements: int = 1 << 26) -> list[Case]:
    """Return what is measured of merging."""
    methods = ("linear", "ties", "dare")
    return [Case(MERGED, f"{method}, 3 x {elements >> 20}M", Merge(elements, method)) for method in methods]
