"""Decode over plain and quantised pages, merging of partial attention, and quantising."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from benchmarks.gpu.attention import SMALL, Sizes, eager, inputs, sdpa
from benchmarks.gpu.case import Case, Op, Run, Tensors, Work
from benchmarks.gpu.shapes import Shape
from toolkit.kernels.decode_attention import SharedPrefix, decode_attention, quantized_decode_attention
from toolkit.kernels.kv_quant import QuantizedCache, quantize_pages
from toolkit.kernels.merge_states import merge_states


def _cache(tensors: Tensors, sizes: Sizes) -> QuantizedCache:
    names = ("k_codes", "k_scale", "k_low", "v_codes", "v_scale", "v_low")
    return QuantizedCache(sizes.bits, *(tensors[name] for name in names))


def decode_inputs(sizes: Sizes, device: torch.device, dtype: torch.dtype) -> Tensors:
    """Make the same, and codes of the keys and values where there are bits."""
    found = inputs(sizes, device, dtype)
    if sizes.bits:
        shape = (len(found["k"]), sizes.page, sizes.kv_heads, sizes.size)
        codes = QuantizedCache.empty(*shape, bits=sizes.bits, dtype=dtype, device=device)
        impl = "triton" if device.type == "cuda" else "reference"
        quantize_pages(found["k"], found["v"], codes, [(i, i, sizes.page) for i in range(len(found["k"]))], impl=impl)
        parts = ("k_codes", "k_scale", "k_low", "v_codes", "v_scale", "v_low")
        found |= {name: getattr(codes, name) for name in parts}
        found["k"], found["v"] = codes.read(torch.arange(len(found["k"]), device=device))
    return found


def bind_decode(tensors: Tensors, sizes: Sizes, impl: Any) -> Run:
    """Prepare attention of one query per sequence."""
    rest = sizes.lengths, tensors["tables"]
    everyone = SharedPrefix(tuple(range(sizes.sequences)), sizes.shared)
    options = sizes.options | {"prefixes": [everyone] if sizes.shared else [], "impl": impl}
    if sizes.bits:
        codes = _cache(tensors, sizes)
        return lambda: [quantized_decode_attention(tensors["q"], codes, *rest, **options)[0].flatten(1)]
    return lambda: [decode_attention(tensors["q"], tensors["k"], tensors["v"], *rest, **options)[0].flatten(1)]


def decode_others(tensors: Tensors, sizes: Sizes) -> Mapping[str, Run]:
    """Return attention over keys and values in full precision that lie together."""
    return {"eager": eager(tensors, sizes), "SDPA": sdpa(tensors, sizes)}


def decode_work(sizes: Sizes, itemsize: int) -> Work:
    """Every key and value once, shared ones once for all; codes with their scales."""
    tokens = sizes.shared + sizes.sequences * (sizes.length - sizes.shared)
    numbers = 2 * tokens * sizes.kv_heads * sizes.size
    read = numbers * itemsize
    if sizes.bits:
        parameters = 2 * tokens * sizes.kv_heads * (1 + sizes.size / sizes.page)
        read = numbers * sizes.bits // 8 + int(parameters) * itemsize
    moved = 2 * sizes.sequences * sizes.heads * sizes.size * itemsize
    return Work(read + moved, 4 * sizes.sequences * sizes.length * sizes.heads * sizes.size)


def merge_inputs(sizes: Sizes, device: torch.device, dtype: torch.dtype) -> Tensors:
    """Make as many parts as there are pages."""
    shape = (sizes.pages, sizes.sequences, sizes.heads)
    return {"out": torch.randn(*shape, sizes.size, device=device).to(dtype), "lse": torch.randn(shape, device=device)}


def bind_merge(tensors: Tensors, sizes: Sizes, impl: Any) -> Run:
    """Prepare merging."""
    return lambda: [merge_states(tensors["out"], tensors["lse"], impl=impl)[0].flatten(1)]


def merge_others(tensors: Tensors, sizes: Sizes) -> Mapping[str, Run]:
    """Return torch's steps one by one."""
    return {"eager": bind_merge(tensors, sizes, "reference")}


def merge_work(sizes: Sizes, itemsize: int) -> Work:
    """Parts once, the result once."""
    rows = sizes.sequences * sizes.heads
    return Work((sizes.pages + 1) * rows * (sizes.size * itemsize + 4))


def bind_quantize(tensors: Tensors, sizes: Sizes, impl: Any) -> Run:
    """Prepare quantising all pages; returned is what the first codes stand for."""
    k, v = tensors["k"], tensors["v"]
    codes = QuantizedCache.empty(*k.shape, bits=sizes.bits, dtype=k.dtype, device=k.device)
    pages, first = [(i, i, sizes.page) for i in range(len(k))], torch.zeros(1, dtype=torch.int64, device=k.device)

    def run() -> list[torch.Tensor]:
        quantize_pages(k, v, codes, pages, impl=impl)
        return [t.flatten(0, 2) for t in codes.read(first)]

    return run


def quantize_work(sizes: Sizes, itemsize: int) -> Work:
    """Numbers once, codes once."""
    numbers = 2 * sizes.sequences * sizes.pages * sizes.page * sizes.kv_heads * sizes.size
    return Work(numbers * itemsize + numbers * sizes.bits // 8)


DECODE = Op(
    "decode_attention", decode_inputs, bind_decode, decode_others, decode_work,
    [SMALL, replace(SMALL, shared=32, size=128), *(replace(SMALL, bits=bits, page=16) for bits in (8, 4))],
)  # fmt: skip
MERGE = Op("merge_states", merge_inputs, bind_merge, merge_others, merge_work, [SMALL])
QUANTIZE = Op(
    "kv_quant", inputs, bind_quantize, lambda *_: {}, quantize_work,
    [replace(SMALL, bits=bits) for bits in (8, 4)], False, exact=True,
)  # fmt: skip


def cases(shape: Shape, *, batch: int = 64, context: int = 8192, alone: int = 1 << 29) -> list[Case]:
    """Return what is measured of a model.

    Args:
        shape: the model.
        batch: sequences of a decode step.
        context: tokens of each.
        alone: bytes of the keys and values of a sequence that is decoded alone; more than the second-level cache holds.
    """
    decode = Sizes(batch, 1, context, shape.heads, shape.kv_heads, shape.size)
    long = replace(decode, sequences=1, length=alone // (4 * shape.kv_heads * shape.size))
    name, aim = f"{shape.name}, {batch} x {context}", "85% of bandwidth"
    found = [
        Case(DECODE, f"{shape.name}, 1 x {long.length}", long, cold=True, goal=aim),
        Case(DECODE, name, decode, cold=True, goal=aim),
        Case(DECODE, f"{name}, half shared", replace(decode, shared=context // 2), cold=True),
        Case(MERGE, f"{shape.name}, {batch} x 8 parts", replace(decode, length=8 * decode.page)),
    ]
    for bits in (8, 4):
        codes = replace(decode, page=64, bits=bits)
        found.append(Case(DECODE, f"{name}, {bits} bits", codes, cold=True))
        found.append(Case(QUANTIZE, f"{shape.name}, {context} tokens, {bits} bits", replace(codes, sequences=1)))
    return found
