"""Which pages hold the keys and values of which tokens, so that prompts that begin alike are computed once.

Only full pages are shared. The key of a page is a hash over the key of the page before it and its own tokens; the first
one's predecessor is the identity of the adapters, so the same text under two adapters never shares a page.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence

from toolkit.serving.pages import Block, PagePool
from toolkit.serving.request import Request


class PrefixCache:
    """Full pages by the tokens that they and the pages before them hold.

    Args:
        pool: where the pages are.

    Attributes:
        num_hits: tokens that requests found computed.
        num_lookups: tokens that requests looked for.
    """

    def __init__(self, pool: PagePool) -> None:
        self.pool = pool
        self.num_hits = self.num_lookups = 0
        self._blocks: dict[bytes, Block] = {}
        self._coming: dict[bytes, Request] = {}

    @property
    def num_pages(self) -> int:
        """Pages that are known."""
        return len(self._blocks)

    def keys(self, request: Request, count: int) -> Sequence[bytes]:
        """Return the keys of the first `count` pages of a request's tokens."""
        size, known = self.pool.page_size, request.page_keys
        if len(known) < count:
            tokens = request.tokens
            for page in range(len(known), count):
                before = known[-1] if known else request.mix.identity.encode()
                known.append(_key(before, tokens[page * size : (page + 1) * size]))
        return known[:count]

    def find(self, request: Request) -> list[Block]:
        """Return the blocks that hold the beginning of a request's tokens, at most all but the last token."""
        found = []
        for key in self.keys(request, (request.num_tokens - 1) // self.pool.page_size):
            block = self._blocks.get(key)
            if block is None:
                break
            found.append(block)
        return found

    def take(self, request: Request) -> None:
        """Give a request that starts what is known of its beginning, and note what it is going to compute."""
        self.num_lookups += request.num_tokens
        if request.sampling.prompt_logprobs is None:  # those need the logits after every token of the prompt
            request.blocks = self.find(request)
            for block in request.blocks:
                self.pool.hold(block)
            request.num_computed = request.num_cached = len(request.blocks) * self.pool.page_size
            self.num_hits += request.num_cached
        for key in self.keys(request, request.num_tokens // self.pool.page_size):
            self._coming.setdefault(key, request)

    def is_coming(self, request: Request) -> bool:
        """Tell whether another request computes the next page of this one just now, so that waiting saves work."""
        if request.sampling.prompt_logprobs is not None:
            return False
        known = len(self.find(request))
        most = (request.num_tokens - 1) // self.pool.page_size
        return known < most and self.keys(request, known + 1)[-1] in self._coming

    def note(self, request: Request, before: int) -> None:
        """Note the pages that were filled since a request had `before` tokens computed."""
        size = self.pool.page_size
        first, stop = before // size, request.num_computed // size
        for page, key in enumerate(self.keys(request, stop)[first:], first):
            if self._coming.get(key) is request:
                del self._coming[key]
            if key not in self._blocks:
                block = request.blocks[page]
                self._blocks[key] = block
                block.on_evict = lambda key=key: self._drop(key)

    def leave(self, request: Request) -> None:
        """Forget what a request was going to compute."""
        for key in request.page_keys:
            if self._coming.get(key) is request:
                del self._coming[key]

    def clear(self) -> None:
        """Forget everything; pages that requests hold stay theirs."""
        for block in self._blocks.values():
            self.pool.forget(block)
        self._blocks.clear()

    def _drop(self, key: bytes) -> None:
        del self._blocks[key]


def _key(before: bytes, tokens: Sequence[int]) -> bytes:
    return hashlib.blake2b(before + array("q", tokens).tobytes(), digest_size=16).digest()
