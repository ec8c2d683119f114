"""The pool of pages that keys and values live in: who owns which. Plain integers, no tensors."""

from __future__ import annotations

from collections.abc import Hashable


class PagePool:
    """Pages `0..num_pages-1`, each free or owned by one sequence.

    Args:
        num_pages: in the pool.
        page_size: tokens that a page holds.
    """

    def __init__(self, num_pages: int, page_size: int) -> None:
        self.num_pages, self.page_size = num_pages, page_size
        self._free = list(reversed(range(num_pages)))
        self._owned: dict[Hashable, list[int]] = {}

    @property
    def num_free(self) -> int:
        """Pages that nobody owns."""
        return len(self._free)

    @property
    def capacity(self) -> int:
        """Tokens that all pages hold."""
        return self.num_pages * self.page_size

    def pages_for(self, num_tokens: int) -> int:
        """Return how many pages a sequence of that many tokens takes."""
        return -(-num_tokens // self.page_size)

    def can_allocate(self, num_tokens: int) -> bool:
        """Tell whether a sequence of that many tokens fits."""
        return self.pages_for(num_tokens) <= len(self._free)

    def allocate(self, owner: Hashable, num_tokens: int) -> list[int]:
        """Give a new owner the pages for a number of tokens, in the order of its block table."""
        assert owner not in self._owned, f"{owner} owns pages already"
        assert self.can_allocate(num_tokens), "the caller asks can_allocate first"
        self._owned[owner] = [self._free.pop() for _ in range(self.pages_for(num_tokens))]
        return self._owned[owner]

    def table(self, owner: Hashable) -> list[int]:
        """Return the pages of an owner."""
        return self._owned[owner]

    def free(self, owner: Hashable) -> None:
        """Take back all pages of an owner; one without pages is fine."""
        self._free.extend(reversed(self._owned.pop(owner, [])))

    def check(self) -> None:
        """Verify that every page is free or owned, once."""
        pages = [*self._free, *(page for table in self._owned.values() for page in table)]
        assert sorted(pages) == list(range(self.num_pages)), "a page is lost, or has two owners"
