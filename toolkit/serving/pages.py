"""The pages that keys, values and adapters live in: who holds which. Plain integers, no tensors.

Pages are held in blocks: one page of a sequence's tokens, or all pages of an adapter. A block has as many holders as
sequences use it. When the last one lets go, its pages are free, or, where the content may be wanted again, *idle*: they
stay as they are until somebody needs the room, and go the longest unused first. So prompts that may come again and
adapters that nobody uses just now share what is left of one pool (Sheng et al., "S-LoRA: Serving Thousands of
Concurrent LoRA Adapters", 2023, arXiv:2311.03285, has keys, values and adapters in one pool).

A sequence may lie anywhere, but one whose pages follow each other can be read where it lies. So a sequence begins in
the middle of the longest stretch of free pages and grows into it, and what does not grow takes the first pages that are
free.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

AHEAD = 64
"""A part of the pool, `1 / AHEAD`, is evicted at once, so that what is freed lies together."""


@dataclass(eq=False)
class Block:
    """Pages that come and go together.

    Attributes:
        pages: in order.
        holders: that use it.
        on_evict: called when an idle block's pages are given to somebody else; without it the block is never idle.
    """

    pages: list[int]
    holders: int = 1
    on_evict: Callable[[], None] | None = None


class PagePool:
    """Pages `0..num_pages-1`, each free or in one block.

    Args:
        num_pages: in the pool.
        page_size: tokens that a page holds.
    """

    def __init__(self, num_pages: int, page_size: int) -> None:
        self.num_pages, self.page_size = num_pages, page_size
        self._is_free = bytearray(b"\1" * num_pages)
        self._num_unused = num_pages
        self._idle: OrderedDict[Block, None] = OrderedDict()
        self._idle_pages = 0
        self._held: set[Block] = set()

    @property
    def num_free(self) -> int:
        """Pages that can be allocated: free or idle."""
        return self._num_unused + self._idle_pages

    @property
    def num_idle(self) -> int:
        """Pages that nobody holds but whose content is kept while there is room."""
        return self._idle_pages

    @property
    def capacity(self) -> int:
        """Tokens that all pages hold."""
        return self.num_pages * self.page_size

    def pages_for(self, num_tokens: int) -> int:
        """Return how many pages a sequence of that many tokens takes."""
        return -(-num_tokens // self.page_size)

    def allocate(self, count: int) -> Block:
        """Give out a block, evicting what was idle the longest as far as that is needed.

        Raises:
            AssertionError: there are not that many pages; the caller asks `num_free` first.
        """
        self._make_room(count)
        return self._take(np.flatnonzero(np.frombuffer(self._is_free, np.uint8))[:count].tolist())

    def allocate_after(self, last: Block | None) -> Block:
        """Give out a page for a sequence that goes on, the one behind its last block if that is free.

        Raises:
            AssertionError: there is no page.
        """
        self._make_room(1)
        page = last.pages[-1] + 1 if last else self.num_pages
        if page >= self.num_pages or not self._is_free[page]:
            page = self._place_in_longest()
        return self._take([page])

    def _place_in_longest(self) -> int:
        """Return the roundest page about the middle of the longest free stretch, or its first if all before is free.

        So sequences that begin one after another lie on a grid, equally far apart, which attention reads at once.
        """
        edges = np.flatnonzero(np.diff(np.frombuffer(self._is_free, np.int8), prepend=0, append=0))
        starts, stops = edges[::2], edges[1::2]
        longest = int((stops - starts).argmax())
        start, stop = int(starts[longest]), int(stops[longest])
        third = (stop - start) // 3
        return _roundest(start + third, stop - third - 1) if start else 0

    def _make_room(self, count: int) -> None:
        assert count <= self.num_free, "the caller asks num_free first"
        if self._num_unused < count:
            wanted = max(count, self.num_pages // AHEAD)
            while self._num_unused < wanted and self._idle:
                self._evict()

    def _take(self, pages: list[int]) -> Block:
        for page in pages:
            self._is_free[page] = 0
        self._num_unused -= len(pages)
        block = Block(pages)
        self._held.add(block)
        return block

    def _give_back(self, block: Block) -> None:
        for page in block.pages:
            self._is_free[page] = 1
        self._num_unused += len(block.pages)

    def _evict(self) -> None:
        block, _ = self._idle.popitem(last=False)
        self._idle_pages -= len(block.pages)
        self._give_back(block)
        assert block.on_evict is not None
        block.on_evict()

    def hold(self, block: Block) -> None:
        """Add a holder to a block, idle or held."""
        if block in self._idle:
            del self._idle[block]
            self._idle_pages -= len(block.pages)
            self._held.add(block)
        assert block in self._held, "the block was evicted"
        block.holders += 1

    def release(self, block: Block) -> None:
        """Take a holder away; the last one leaves the pages idle or free."""
        block.holders -= 1
        if block.holders:
            return
        self._held.remove(block)
        if block.on_evict is None:
            self._give_back(block)
        else:
            self._idle[block] = None
            self._idle_pages += len(block.pages)

    def forget(self, block: Block) -> None:
        """Let a block's content go: its pages are free as soon as nobody holds it."""
        block.on_evict = None
        if block in self._idle:
            del self._idle[block]
            self._idle_pages -= len(block.pages)
            self._give_back(block)

    def check(self) -> None:
        """Verify that every page is free or in one block, and that held blocks have holders and idle ones none."""
        blocks = [*self._idle, *self._held]
        unused = [page for page, is_free in enumerate(self._is_free) if is_free]
        pages = [*unused, *(page for block in blocks for page in block.pages)]
        assert len(unused) == self._num_unused
        assert sorted(pages) == list(range(self.num_pages)), "a page is lost, or is in two blocks"
        assert all(block.holders > 0 for block in self._held), "a block is held by nobody"
        assert all(block.holders == 0 and block.on_evict for block in self._idle), "an idle block has a holder"
        assert self._idle_pages == sum(len(block.pages) for block in self._idle)


def _roundest(low: int, high: int) -> int:
    """Return the number from `low` to `high` that the largest power of two divides."""
    keep = (low ^ high).bit_length()  # bits below which they differ
    if low & ((1 << keep) - 1) == 0:
        return low
    return high >> (keep - 1) << (keep - 1)
