"""One launch: everything that models differ in is a small table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from toolkit.kernels.launch import Table, generation_of, launch
from toolkit.kernels.merge_elementwise import triton as kernels
from toolkit.kernels.merge_elementwise.api import BLOCK, KeptAtRandom, KeptLargest, Vote

TABLE = Table(Path(__file__).with_name("table.json"))

_VOTES = {"weighted": 1, "total": 2, "frequency": 3}


def merge_elementwise(
    x_MN: torch.Tensor,
    weights: Sequence[float],
    kept: KeptLargest | KeptAtRandom | None,
    vote: Vote | None,
    scale: float,
    base_N: torch.Tensor | None,
    start: int,
) -> torch.Tensor:
    """See the api."""
    (models, count), device = x_MN.shape, x_MN.device
    found = TABLE.choose("_merge_elements", generation_of(device))
    out_N = torch.empty(count, dtype=torch.float32, device=device)
    size = found.constants["BLOCK"]
    assert BLOCK % size == 0, "a tile lies in one block of random numbers"
    shift = start % size
    shares = list(weights) if vote and vote.divisor == "weights" else [1.0] * models
    common = weights[0] if vote is None else shares[0]
    random = isinstance(kept, KeptAtRandom)
    arguments = {
        "x_ptr": x_MN,
        "base_ptr": out_N if base_N is None else base_N,
        "out_ptr": out_N,
        "weights_ptr": _floats(weights, device),
        "kept_ptr": _table(tuple(_limits(kept, start, count)), torch.int64, device),
        "keys_ptr": kept.keys_MB2.contiguous() if random else out_N,
        "factors_ptr": _floats(kept.factors, device) if random else out_N,
        "shares_ptr": _floats(shares, device),
        "order_ptr": _table(tuple(_order(shares)), torch.int32, device),
        "models": models,
        "count": count,
        "shift": shift,
        "lead": (start - shift) % BLOCK,
        "blocks": kept.keys_MB2.shape[1] if random else 0,
        "x_stride": x_MN.stride(0),
        "zero_flip": -(1 << 31) if vote and vote.zero < 0 else 0,
        "common": float(common),
        "scale": float(scale),
    }
    one_share = len(set(shares)) == 1 and shares[0] != 0
    constants = {
        "KEPT": 0 if kept is None else 1 + random,
        "VOTE": 0 if vote is None else _VOTES[vote.by],
        "DIVISOR": 0 if vote is None or vote.divisor == "none" else 1 if one_share else 2,
        "COMMON": int(vote is None and len(set(weights)) == 1),
        "BASE": int(base_N is not None),
    }
    configuration = replace(found, constants={**found.constants, **constants})
    launch(kernels._merge_elements, (-(-(shift + count) // size) if count else 0,), arguments, configuration)
    return out_N


def _floats(values: Sequence[float], device: torch.device) -> torch.Tensor:
    return _table(tuple(values), torch.float32, device)


@lru_cache(maxsize=64)
def _table(values: tuple[Any, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Upload small numbers once: most slices of a merge have the same ones."""
    return torch.tensor(values, dtype=dtype, device=device)


def _limits(kept: KeptLargest | KeptAtRandom | None, start: int, count: int) -> list[tuple[int, int]]:
    """Return what elements are compared with: a threshold, and the elements up to which being equal to it is enough."""
    if isinstance(kept, KeptLargest):
        ends = [min(max(last + 1 - start, 0), count) for last in kept.lasts]
        return list(zip(kept.thresholds, ends, strict=True))
    return [(0, 0)] if kept is None else [(limit, 0) for limit in kept.limits]


def _order(shares: Sequence[float]) -> list[tuple[int, int]]:
    """Return the models, those of equal shares together, and 1 for the last of each."""
    firsts = {share: i for i, share in reversed(list(enumerate(shares)))}
    order = sorted(range(len(shares)), key=lambda model: (firsts[shares[model]], model))
    following = [*(shares[model] for model in order[1:]), None]
    return [(model, int(shares[model] != after)) for model, after in zip(order, following, strict=True)]
