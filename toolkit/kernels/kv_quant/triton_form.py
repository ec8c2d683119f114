"""One program per page and head."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from toolkit.kernels.kv_quant import triton as kernels
from toolkit.kernels.kv_quant.cache import QuantizedCache
from toolkit.kernels.launch import Table, generation_of, launch

TABLE = Table(Path(__file__).with_name("table.json"))


def quantize_pages(
    k_cache: torch.Tensor, v_cache: torch.Tensor, cache: QuantizedCache, pages: Sequence[tuple[int, int, int]]
) -> None:
    """See the api."""
    found = TABLE.choose("_quantize", generation_of(k_cache.device), size=cache.size)
    constants = {"BITS": cache.bits, "SIZE": cache.size, "PAGE": cache.page}
    arguments = {
        "k_ptr": k_cache,
        "v_ptr": v_cache,
        "pages_ptr": torch.tensor(pages, dtype=torch.int32, device=k_cache.device).view(-1, 3),
        **{f"{name}_ptr": getattr(cache, name) for name in ("k_codes", "k_scale", "k_low")},
        **{f"{name}_ptr": getattr(cache, name) for name in ("v_codes", "v_scale", "v_low")},
        **dict(zip(("k_page_stride", "k_stride", "k_head_stride"), k_cache.stride(), strict=False)),
        **dict(zip(("v_page_stride", "v_stride", "v_head_stride"), v_cache.stride(), strict=False)),
        "heads": cache.heads,
        "margin": 1 + torch.finfo(cache.dtype).eps,
    }
    grid = (len(pages), cache.heads)
    launch(kernels._quantize, grid, arguments, replace(found, constants={**found.constants, **constants}))
