"""Keys and values of requests that had to make room, kept on the host until their turn comes again.

Pages are copied in as few transfers as there are runs of neighbouring pages, and a full page once: a request that is
put back a second time moves only what was written since (Shen et al., "FastSwitch: Optimizing Context Switching
Efficiency in Fairness-aware Large Language Model Serving", 2024, arXiv:2411.18424).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from toolkit.serving.request import Request


class Mover(Protocol):
    """Copies pages between the device and the host, in the order in which it is asked."""

    def save(self, start: int, count: int) -> Sequence[Any]:
        """Return the content of `count` neighbouring pages, each by itself."""
        ...

    def load(self, start: int, contents: Sequence[Any]) -> None:
        """Write contents into neighbouring pages."""
        ...


@dataclass
class _Saved:
    """Contents of a request's first pages; the last one may have been partly filled."""

    contents: list[Any] = field(default_factory=list)
    num_full: int = 0
    num_computed: int = 0


class SwapSpace:
    """Room on the host for pages of requests that wait.

    Args:
        mover: copies pages.
        capacity: pages that it holds.

    Attributes:
        num_pages: in use.
        num_moved: pages copied out so far.
        num_transfers: in both directions.
    """

    def __init__(self, mover: Mover, capacity: int) -> None:
        self.mover, self.capacity = mover, capacity
        self.num_pages = self.num_moved = self.num_transfers = 0
        self._saved: dict[Request, _Saved] = {}

    def save(self, request: Request, page_size: int) -> bool:
        """Copy what a request has computed; `False` if there is no room for it."""
        saved = self._saved.get(request, _Saved())
        used = request.num_virtual + request.num_computed
        pages = request.pages[: -(-used // page_size)]
        if self.num_pages - len(saved.contents) + len(pages) > self.capacity:
            return False
        # A page that was full when it was saved has not changed since.
        contents = saved.contents[: saved.num_full]
        fresh = pages[saved.num_full :]
        for start, count in runs(fresh):
            contents += self.mover.save(start, count)
            self.num_transfers += 1
        self.num_moved += len(fresh)
        self.num_pages += len(contents) - len(saved.contents)
        self._saved[request] = _Saved(contents, used // page_size, request.num_computed)
        return True

    def pages_of(self, request: Request) -> int:
        """Return how many pages are kept for a request that waits to come back."""
        saved = self._saved.get(request)
        return len(saved.contents) if saved else 0

    def load(self, request: Request) -> None:
        """Write a request's pages back into its first blocks; they stay here too, for the next time."""
        saved, pages = self._saved[request], request.pages
        at = 0
        for start, count in runs(pages[: len(saved.contents)]):
            self.mover.load(start, saved.contents[at : at + count])
            self.num_transfers += 1
            at += count
        request.num_computed = saved.num_computed

    def drop(self, request: Request) -> None:
        """Forget a request's pages."""
        saved = self._saved.pop(request, None)
        if saved:
            self.num_pages -= len(saved.contents)


def runs(pages: Sequence[int]) -> list[tuple[int, int]]:
    """Return start and length of each run of consecutive numbers, in order."""
    found: list[tuple[int, int]] = []
    for page in pages:
        if found and page == sum(found[-1]):
            found[-1] = (found[-1][0], found[-1][1] + 1)
        else:
            found.append((page, 1))
    return found
