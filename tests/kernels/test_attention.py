"""What attention operations have in common: pages, masks, and compiling for GPUs that are not there."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.harness import check_resources, compile_in_process
from toolkit.kernels.decode_attention import triton_form as decode_form
from toolkit.kernels.launch import GENERATIONS
from toolkit.kernels.paging import gather, visible
from toolkit.kernels.prefill_attention import triton_form as prefill_form
from toolkit.kernels.scoring import normalise

CASES = [
    "attend_in_prefill",
    "attend_in_training",
    "attend_in_decode",
    "attend_to_codes",
    "attend_to_half_codes",
    "quantize",
    "quantize_to_half_codes",
    "merge",
]


def test_paging_helpers():
    cache = torch.arange(5 * 2 * 1 * 1.0).view(5, 2, 1, 1)
    table = torch.tensor([[3, 1], [0, 4]])
    assert gather(cache, table, 3).flatten().tolist() == [6, 7, 2, 0, 1, 8]
    assert gather(cache, table[0], 4).flatten().tolist() == [6, 7, 2, 3]
    assert visible(1, 3, 3, 2, torch.device("cpu")).tolist() == [[True, True, False], [False, True, True]]
    assert visible(-1, 4, 2, None, torch.device("cpu")).sum(1).tolist() == [0, 1, 2, 2, 2]
    assert visible(4, 6, 6, 2, torch.device("cpu"), 1).tolist() == [[1, 0, 0, 1, 1, 0], [1, 0, 0, 0, 1, 1]]


@pytest.mark.parametrize("shape", [(3, 0), (3, 4)])
def test_rows_that_see_nothing_have_no_shares_and_no_gradient(shape):
    scores = torch.full(shape, -torch.inf, requires_grad=True)
    shares, lse = normalise(scores, None)
    assert not shares.any()
    assert (lse == -torch.inf).all()
    shares.sum().backward()
    assert scores.grad is not None
    assert not scores.grad.isnan().any()


@pytest.mark.parametrize("generation", GENERATIONS)
def test_compiles(generation):
    found = compile_in_process(CASES, generation)
    check_resources(found, GENERATIONS[generation].shared_memory)
    kernels = {*prefill_form.TABLE.kernels(generation), *decode_form.TABLE.kernels(generation), "_quantize", "_merge"}
    assert {kernel["kernel"] for kernel in found} == kernels
    # The scales of codes are few and narrow; keys and values are loaded 16 bytes at a time.
    assert not [kernel for kernel in found if kernel["narrow"] and not kernel["constants"].get("BITS")]


@pytest.mark.slow
@pytest.mark.parametrize("generation", GENERATIONS)
def test_whole_table_compiles(generation):
    cases = [
        *CASES,
        *(f"attend_in_{what}_float32" for what in ("prefill", "training", "decode")),
        "attend_in_every_way",
    ]
    found = compile_in_process(cases, generation, whole_table=True)
    check_resources(found, GENERATIONS[generation].shared_memory)
