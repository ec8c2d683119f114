"""Blocks of pages: free, held or idle, each once."""

from __future__ import annotations

import random

import pytest

from toolkit.serving.pages import PagePool, _roundest


def test_pool_gives_pages_once_and_takes_them_back():
    pool = PagePool(5, 4)
    first = pool.allocate(3)
    assert (first.pages, pool.num_free, pool.pages_for(9)) == ([0, 1, 2], 2, 3)
    pool.hold(first)
    pool.release(first)
    pool.check()
    assert pool.num_free == 2
    pool.release(first)
    assert pool.num_free == 5
    assert pool.allocate(4).pages == [0, 1, 2, 3]
    with pytest.raises(AssertionError, match="asks num_free first"):
        pool.allocate(2)


def test_idle_pages_stay_until_the_room_is_needed_and_go_the_longest_unused_first():
    pool, gone = PagePool(4, 1), []
    blocks = [pool.allocate(1) for _ in range(4)]
    for name, block in zip("abcd", blocks, strict=True):
        block.on_evict = lambda name=name: gone.append(name)
    for index in (1, 0, 2):
        pool.release(blocks[index])
    assert (pool.num_free, pool.num_idle, gone) == (3, 3, [])
    pool.hold(blocks[1])
    pool.release(blocks[1])
    assert pool.allocate(2).pages == [0, 2]
    assert gone == ["a", "c"]
    pool.forget(blocks[1])
    assert (pool.num_free, pool.num_idle, gone) == (1, 0, ["a", "c"])
    pool.check()


def test_sequences_that_grow_side_by_side_lie_together():
    pool = PagePool(128, 4)
    adapter = pool.allocate(5)
    sequences = [[] for _ in range(6)]
    for _ in range(8):
        for blocks in sequences:
            blocks.append(pool.allocate_after(blocks[-1] if blocks else None))
    pages = [[block.pages[0] for block in blocks] for blocks in sequences]
    assert pages == [list(range(own[0], own[0] + 8)) for own in pages]
    assert adapter.pages == list(range(5))
    pool.check()


def test_sequences_that_begin_one_after_another_lie_on_a_grid():
    pool = PagePool(512, 4)
    begins = sorted(pool.allocate_after(None).pages[0] for _ in range(16))
    assert begins == list(range(0, 512, 32))
    # Whoever comes in place of one that has gone begins where it did.
    hole = pool.allocate_after(None)
    pool.release(hole)
    assert pool.allocate_after(None).pages == hole.pages


def test_the_roundest_number():
    for low in range(40):
        for high in range(low, 70):
            found = _roundest(low, high)
            divides = [n & -n if n else 1 << 30 for n in range(low, high + 1)]
            assert low <= found <= high
            assert divides[found - low] == max(divides)


def test_a_sequence_that_meets_another_goes_on_where_there_is_room():
    pool = PagePool(6, 4)
    blocks = [pool.allocate_after(None)]
    assert blocks[0].pages == [0]
    assert pool.allocate(4).pages == [1, 2, 3, 4]
    blocks.append(pool.allocate_after(blocks[-1]))
    assert [block.pages[0] for block in blocks] == [0, 5]
    pool.check()


def test_a_part_of_the_pool_is_evicted_at_once():
    pool, gone = PagePool(256, 4), []
    blocks = [pool.allocate(1) for _ in range(256)]
    for block in blocks:
        block.on_evict = lambda block=block: gone.append(block.pages[0])
        pool.release(block)
    assert [pool.allocate_after(None).pages, gone] == [[0], [0, 1, 2, 3]]
    pool.check()


@pytest.mark.system("s_lora")
@pytest.mark.parametrize("seed", range(10))
def test_every_page_is_free_or_in_one_block_after_anything(seed):
    rng, pool = random.Random(seed), PagePool(30, 4)
    held, idle = [], []
    for _ in range(500):
        action = rng.choice("ahrrf")
        if action == "a":
            count = rng.randint(1, 6)
            if count <= pool.num_free:
                block = pool.allocate(count) if count > 1 else pool.allocate_after(held[-1] if held else None)
                if rng.random() < 0.6:
                    block.on_evict = lambda block=block: idle.remove(block)
                held.append(block)
        elif action == "h" and held + idle:
            block = rng.choice(held + idle)
            pool.hold(block)
            held.append(block)
            if block in idle:
                idle.remove(block)
        elif action == "r" and held:
            block = held.pop(rng.randrange(len(held)))
            pool.release(block)
            if block.on_evict and block not in held:
                idle.append(block)
        elif action == "f" and held:
            pool.forget(rng.choice(held))
        pool.check()
        owned = sum(len(block.pages) for block in {*held})
        assert pool.num_free == pool.num_pages - owned
        assert pool.num_idle == sum(len(block.pages) for block in idle)


def test_check_sees_a_page_in_two_blocks_and_a_holder_too_few():
    pool = PagePool(3, 4)
    first, second = pool.allocate(1), pool.allocate(1)
    second.pages[0] = first.pages[0]
    with pytest.raises(AssertionError, match="in two blocks"):
        pool.check()
    second.pages[0], second.holders = 1, 0
    with pytest.raises(AssertionError, match="held by nobody"):
        pool.check()
