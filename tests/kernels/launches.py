"""What each operation launches at sizes of real models, to be compiled: every function returns the operation's table.

Nothing is computed, so tensors are not filled.
"""

from __future__ import annotations

import torch

from toolkit.kernels.grouped_lora import PagedPairs, Pair, Routes, paged_lora, paged_lora_backward, triton_form
from toolkit.kernels.launch import Table


def lora_pairs(slots: int, k: int, widths: tuple[int, ...], *, dora: bool, dtype: torch.dtype) -> PagedPairs:
    """Adapters of rank 16 at some linears."""
    empty = torch.zeros
    factors = [Pair(empty(16, k), empty(n, 16), empty(n) if dora else None) for n in widths]
    page = 4096
    needed = PagedPairs(empty(0, page), k, widths, 1).pages_for(factors)
    pairs = PagedPairs(empty(needed, page, dtype=dtype), k, widths, slots)
    pairs.place(0, factors, range(needed))
    for slot in range(1, slots):
        # All share the pages of the first: what is read is no matter here.
        pairs._lists[slot] = pairs._lists[0]
        pairs._sides[:, :, slot] = pairs._sides[:, :, 0]
        pairs._extras[:, :, slot] = pairs._extras[:, :, 0]
    pairs._upload()
    return pairs


def run(
    slots: list, k: int, widths: tuple[int, ...], *, dora: bool = False, dtype: torch.dtype = torch.bfloat16
) -> Table:
    """Add the adapters' changes."""
    pairs = lora_pairs(8, k, widths, dora=dora, dtype=dtype)
    x, ys = torch.zeros(len(slots), k, dtype=dtype), [torch.zeros(len(slots), n, dtype=dtype) for n in widths]
    paged_lora(ys, x, Routes.of(slots), pairs, impl="triton")
    return triton_form.TABLE


def decode() -> Table:
    """One row per adapter, and a few; q, k and v of Llama-3-8B."""
    run(list(range(8)), 4096, (4096, 1024, 1024))
    return run([row // 2 for row in range(16)], 4096, (4096, 1024, 1024), dora=True)


def prefill() -> Table:
    """Hundreds of rows per adapter; gate and up."""
    return run([row // 256 for row in range(1024)], 4096, (14336, 14336))


def decode_float32() -> Table:
    """One row and several rows per adapter in float32."""
    return run([row // 2 for row in range(15)], 4096, (4096, 1024, 1024), dtype=torch.float32)


def prefill_float32() -> Table:
    """The same in float32."""
    return run([row // 64 for row in range(256)], 4096, (4096, 4096), dtype=torch.float32)


def backward() -> Table:
    """Two adapters trained at once."""
    pairs = lora_pairs(8, 4096, (4096, 1024, 1024), dora=False, dtype=torch.bfloat16)
    x = torch.zeros(512, 4096, dtype=torch.bfloat16)
    dys = [torch.zeros(512, n, dtype=torch.bfloat16) for n in (4096, 1024, 1024)]
    paged_lora_backward(dys, x, Routes.of([row // 256 for row in range(512)]), pairs, impl="triton")
    return triton_form.TABLE


def embedding() -> Table:
    """Looking tokens up instead of multiplying."""
    pairs = lora_pairs(8, 32000, (4096,), dora=False, dtype=torch.bfloat16)
    y, tokens = torch.zeros(8, 4096, dtype=torch.bfloat16), torch.zeros(8, dtype=torch.int64)
    paged_lora([y], tokens, Routes.of(range(8)), pairs, impl="triton")
    return triton_form.TABLE
