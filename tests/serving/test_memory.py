"""The layout of pages: nothing overlaps, and what is saved is a copy."""

from __future__ import annotations

import pytest
import torch

from toolkit.serving.memory import LARGEST_UNIT, Memory, page_elements


@pytest.mark.system("s_lora")
@pytest.mark.parametrize("layers", [{0: (2, 12), 1: (2, 12)}, {0: (1, 8), 3: (4, 16)}, {0: (8, 128)}])
@pytest.mark.parametrize("page_size", [1, 3, 16])
def test_every_number_of_a_page_belongs_to_one_layer_side_token_head_and_feature(layers, page_size):
    memory = Memory(layers, 5, page_size, torch.float64, "cpu")
    count = 0
    for side in (memory.keys, memory.values):
        for layer, (heads, size) in layers.items():
            assert side[layer].shape == (5, page_size, heads, size)
            side[layer].copy_(torch.arange(count, count + side[layer].numel()).view(side[layer].shape))
            count += side[layer].numel()
    written = torch.cat([side[layer].flatten() for side in (memory.keys, memory.values) for layer in layers])
    assert torch.equal(written, torch.arange(count, dtype=torch.float64)), "two places are the same"
    assert memory.nbytes == 5 * memory.page_bytes == memory.units.nbytes
    spare = memory.page_elements - count / 5
    assert spare <= max(memory.page_elements / 32, 16 * 2 * len(layers)), "little is spare"


def test_tokens_of_neighbouring_pages_are_one_tensor():
    memory = Memory({0: (2, 16), 1: (2, 16)}, 6, 4, torch.float32, "cpu")
    memory.keys[1][2:4] = torch.arange(2 * 4 * 32.0).view(2, 4, 2, 16)
    tokens = memory.keys[1].view(6 * 4, 2, 16)
    assert torch.equal(tokens[8:16].flatten(), torch.arange(256.0))


def test_units_of_pages_are_the_pages():
    memory = Memory({0: (2, 16)}, 4, 16, torch.float32, "cpu")
    memory.keys[0][2] = 7.0
    own = memory.units[memory.units_of([2])]
    assert own.numel() == memory.page_elements
    assert (own == 7).sum() == memory.keys[0][2].numel()
    assert not memory.units[memory.units_of([0, 1, 3])].any()


def test_units_are_powers_of_two_that_waste_little():
    for heads, size, page in ((1, 4, 1), (2, 12, 4), (8, 128, 16), (32, 128, 32), (3, 40, 7)):
        elements, unit = page_elements(dict.fromkeys(range(3), (heads, size)), page)
        wanted = 2 * page * 3 * heads * size
        assert unit & (unit - 1) == 0
        assert unit <= LARGEST_UNIT
        assert elements % unit == 0
        assert wanted <= elements <= wanted + max(16 * 2 * 3, wanted // 32)


@pytest.mark.system("fastswitch")
def test_what_was_saved_does_not_change_with_the_page_and_comes_back_to_the_bit():
    memory = Memory({0: (2, 16), 1: (2, 16)}, 6, 4, torch.float32, "cpu")
    for side in (memory.keys, memory.values):
        for layer in side.values():
            layer.copy_(torch.randn(layer.shape, generator=torch.Generator().manual_seed(1)))
    before = [memory.keys[0][1:4].clone(), memory.values[1][1:4].clone()]
    saved = memory.save(1, 3)
    memory.keys[0].fill_(0)
    memory.values[1].fill_(0)
    memory.load(3, saved)
    assert torch.equal(memory.keys[0][3:6], before[0])
    assert torch.equal(memory.values[1][3:6], before[1])
    assert not memory.keys[0][:3].any()
