"""Write pages of keys and values into a quantised cache.

Shape suffixes: P pages, G key/value heads, D features.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from toolkit.kernels.impl import Impl, resolve

if TYPE_CHECKING:
    import torch

    from toolkit.kernels.kv_quant.cache import QuantizedCache


def quantize_pages(
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    cache: QuantizedCache,
    pages: Sequence[tuple[int, int, int]],
    *,
    impl: Impl | None = None,
) -> None:
    """Quantise pages: keys per channel over the tokens of a page, values per token over the features of a head.

    Outliers of keys sit in few channels and those of values do not, which is why each has its own direction, as in KIVI
    (Liu et al. 2024, arXiv:2402.02750). A number becomes `low + code * scale`, with `low` the least of its kind. Every
    error is at most half a `scale`.

    Args:
        k_cache: `[P, page, G, D]`, keys in full precision.
        v_cache: the same of values.
        cache: written; of the same page, heads, features and dtype, its pages are its own.
        pages: for each page its number in `k_cache`, its number in `cache`, and how many first tokens it holds; the
            others become 0 and are not looked at.
        impl: form to run.

    Raises:
        ValueError: caches that do not fit each other, or pages with no tokens or too many.
        UnsupportedError: no such form on this device.
    """
    form = resolve(impl, ("triton", "reference"), k_cache.device, "quantize_pages")
    shape, wanted = tuple(k_cache.shape[1:]), (cache.page, cache.heads, cache.size)
    if shape != wanted or tuple(v_cache.shape[1:]) != wanted or {k_cache.dtype, v_cache.dtype} != {cache.dtype}:
        raise ValueError(f"pages of {shape} in {k_cache.dtype} for a cache of {wanted} in {cache.dtype}")
    if any(not 1 <= count <= cache.page for _, _, count in pages):
        raise ValueError(f"a page to be quantised holds 1 to {cache.page} tokens")
    if form == "triton":
        from toolkit.kernels.kv_quant.triton_form import quantize_pages as run
    else:
        from toolkit.kernels.kv_quant.reference import quantize_pages as run
    run(k_cache, v_cache, cache, pages)
