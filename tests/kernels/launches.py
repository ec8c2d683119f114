"""What each operation launches at sizes of real models, to be compiled: every function returns the operation's table.

Nothing is computed, so tensors are not filled.
"""

from __future__ import annotations

import torch

from toolkit.kernels.decode_attention import SharedPrefix, decode_attention, quantized_decode_attention
from toolkit.kernels.decode_attention import triton_form as decode_form
from toolkit.kernels.delta_linear import BitDeltas, delta_linear
from toolkit.kernels.delta_linear import triton_form as delta_form
from toolkit.kernels.grouped_lora import PagedPairs, Pair, Routes, paged_lora, paged_lora_backward, triton_form
from toolkit.kernels.kv_quant import QuantizedCache, quantize_pages
from toolkit.kernels.kv_quant import triton_form as quant_form
from toolkit.kernels.launch import Table
from toolkit.kernels.merge_elementwise import KeptAtRandom, KeptLargest, Vote, merge_elementwise
from toolkit.kernels.merge_elementwise import triton_form as elementwise_form
from toolkit.kernels.merge_states import merge_states
from toolkit.kernels.merge_states import triton_form as merge_form
from toolkit.kernels.prefill_attention import packed_attention, prefill_attention
from toolkit.kernels.prefill_attention import triton_form as prefill_form


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
    pairs._is_uploaded = False
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


def attend_in_prefill(dtype: torch.dtype = torch.bfloat16) -> Table:
    """A chunk of 512 tokens after a cached prefix, 32 heads of 128 in 8 groups."""
    cache = torch.zeros(160, 16, 8, 128, dtype=dtype)
    q, tables = torch.zeros(512, 32, 128, dtype=dtype), torch.zeros(1, 160, dtype=torch.int64)
    prefill_attention(q, cache, cache, [0, 512], [2500], tables, scale=0.1, impl="triton")
    return prefill_form.TABLE


def attend_in_prefill_float32() -> Table:
    """The same in float32."""
    return attend_in_prefill(torch.float32)


def attend_in_training(dtype: torch.dtype = torch.bfloat16) -> Table:
    """Two sequences, forward and backward."""
    q = torch.zeros(1024, 32, 128, dtype=dtype, requires_grad=True)
    k = torch.zeros(1024, 8, 128, dtype=dtype, requires_grad=True)
    # Whatever was not computed would be differentiated.
    packed_attention(q, k, k, [0, 300, 1024], scale=0.1, impl="triton")[0].sum().backward()
    return prefill_form.TABLE


def attend_in_training_float32() -> Table:
    """The same in float32."""
    return attend_in_training(torch.float32)


def attend_in_decode(dtype: torch.dtype = torch.bfloat16) -> Table:
    """Sequences of their own, and some with a prefix in common."""
    cache = torch.zeros(512, 16, 8, 128, dtype=dtype)
    q, tables = torch.zeros(8, 32, 128, dtype=dtype), torch.zeros(8, 512, dtype=torch.int64)
    shared = [SharedPrefix(tuple(range(6)), 1024)]
    decode_attention(q, cache, cache, [2000] * 8, tables, scale=0.1, prefixes=shared, impl="triton")
    return decode_form.TABLE


def attend_in_decode_float32() -> Table:
    """The same in float32."""
    return attend_in_decode(torch.float32)


def attend_in_every_way() -> Table:
    """One head of an odd size with a window, a global token, a cap and a sink; ones are compiled in as constants."""
    size, dtype = 80, torch.float16
    q, cache = torch.zeros(1, 1, size, dtype=dtype), torch.zeros(4, 16, 1, size, dtype=dtype)
    options = {"scale": 1.0, "window": 1, "num_global": 1, "soft_cap": 5.0, "sinks_H": torch.zeros(1), "impl": "triton"}
    tables = torch.zeros(1, 1, dtype=torch.int64)
    prefill_attention(q, cache, cache, [0, 1], [16], tables, **options)
    leaves = [torch.zeros(8, 1, size, dtype=dtype, requires_grad=True) for _ in range(3)]
    packed_attention(*leaves, [0, 8], **options)[0].sum().backward()
    decode_attention(q, cache, cache, [16], tables, **options)
    return prefill_form.TABLE


def attend_to_codes(bits: int = 8) -> Table:
    """Keys and values of 8 bits."""
    options = {"bits": bits, "dtype": torch.bfloat16, "device": torch.device("cpu")}
    cache = QuantizedCache.empty(64, 64, 8, 128, **options)
    q, tables = torch.zeros(8, 32, 128, dtype=torch.bfloat16), torch.zeros(8, 64, dtype=torch.int64)
    quantized_decode_attention(q, cache, [2000] * 8, tables, scale=0.1, impl="triton")
    return decode_form.TABLE


def attend_to_half_codes() -> Table:
    """Keys and values of 4 bits."""
    return attend_to_codes(4)


def quantize(bits: int = 8) -> Table:
    """Pages of 64 tokens in 8 bits."""
    options = {"bits": bits, "dtype": torch.bfloat16, "device": torch.device("cpu")}
    full = torch.zeros(4, 64, 8, 128, dtype=torch.bfloat16)
    quantize_pages(full, full, QuantizedCache.empty(4, 64, 8, 128, **options), [(0, 1, 64), (2, 2, 5)], impl="triton")
    return quant_form.TABLE


def quantize_to_half_codes() -> Table:
    """In 4 bits."""
    return quantize(4)


def merge() -> Table:
    """Three parts."""
    merge_states(torch.zeros(3, 8, 32, 128, dtype=torch.bfloat16), torch.zeros(3, 8, 32), impl="triton")
    return merge_form.TABLE


def add_deltas(tasks: list[int], dtype: torch.dtype, *, mask: bool) -> Table:
    """Linears of 4096 features of eight fine-tunes."""
    n, k = 1024, 4096
    vector = torch.zeros(n, k, dtype=dtype) if mask else None
    deltas = BitDeltas(torch.zeros(8, n, k // 8, dtype=torch.uint8), torch.ones(8, 1), vector)
    rows = len(tasks)
    delta_linear(torch.zeros(rows, n, dtype=dtype), torch.zeros(rows, k, dtype=dtype), tasks, deltas, impl="triton")
    return delta_form.TABLE


def masks_in_decode(dtype: torch.dtype = torch.bfloat16) -> Table:
    """One row per fine-tune."""
    return add_deltas(list(range(8)), dtype, mask=True)


def masks_in_prefill(dtype: torch.dtype = torch.bfloat16) -> Table:
    """Hundreds of rows per fine-tune."""
    return add_deltas([row // 512 for row in range(4096)], dtype, mask=True)


def masks_in_decode_float32() -> Table:
    """The same in float32."""
    return masks_in_decode(torch.float32)


def masks_in_prefill_float32() -> Table:
    """The same in float32."""
    return masks_in_prefill(torch.float32)


def signs_in_decode() -> Table:
    """One row per fine-tune of signs."""
    return add_deltas(list(range(8)), torch.bfloat16, mask=False)


def signs_in_prefill() -> Table:
    """Hundreds of rows per fine-tune of signs."""
    return add_deltas([row // 512 for row in range(4096)], torch.bfloat16, mask=False)


def merge_weights() -> Table:
    """Three models by sum, by sign with the largest elements, and with elements at random."""
    x, base = torch.zeros(3, 2**18), torch.zeros(2**18)
    weights, keys = [0.2, 0.3, 0.5], torch.zeros(3, 4, 2, dtype=torch.int32)
    random = KeptAtRandom(keys, [2**31] * 3, [2.0] * 3)
    largest = KeptLargest([2**29] * 3, [7] * 3)
    for options in ({}, {"kept": largest, "vote": Vote()}, {"kept": random, "vote": Vote("total", -1.0, "count")}):
        merge_elementwise(x, weights, base_N=base, impl="triton", **options)
    merge_elementwise(x.bfloat16(), [0.5] * 3, kept=random, impl="triton")
    return elementwise_form.TABLE
