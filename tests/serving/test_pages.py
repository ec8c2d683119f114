"""Blocks of pages: free, held or idle, each once."""

from __future__ import annotations

import random

import pytest

from toolkit.serving.pages import PagePool


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
    assert pool.allocate(2).pages == [2, 0]
    assert gone == ["a", "c"]
    pool.forget(blocks[1])
    assert (pool.num_free, pool.num_idle, gone) == (1, 0, ["a", "c"])
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
                block = pool.allocate(count)
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
