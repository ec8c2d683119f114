"""Which tokens of which requests run in the next step. Plain Python on integers and queues.

A step has a budget of tokens. Every running answer gets its next token first, so that no prefill delays it; what
is left goes to prompts, a long one in chunks over several steps (Agrawal et al., "Taming Throughput-Latency Tradeoff in
LLM Inference with Sarathi-Serve", 2024, arXiv:2403.02310).

Pages are given as they are filled. When there are none, the running request whose turn came last goes back into the
queue: what it computed is kept on the host, or computed anew when its turn comes again. The first in turn can always go
on, since a request that alone would not fit is refused at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

from toolkit.errors import RequestError
from toolkit.serving.fairness import ANSWER, PROMPT, FairQueue
from toolkit.serving.mix import Mix
from toolkit.serving.pages import Block, PagePool
from toolkit.serving.preemption import SwapSpace
from toolkit.serving.prefix import PrefixCache
from toolkit.serving.request import Request


@dataclass(frozen=True)
class Work:
    """The next `count` uncomputed tokens of a request."""

    request: Request
    count: int

    @cached_property
    def completes(self) -> bool:
        """Whether all tokens are computed after it, so that the next one can be sampled; as it was planned."""
        return self.count == self.request.num_pending


class Residents(Protocol):
    """Where adapters are: what the scheduler asks before a request starts."""

    def prepare(self, mix: Mix) -> bool:
        """Tell whether the adapters can be put into the pool now; see to it that they soon can, if not."""
        ...

    def expect(self, mix: Mix) -> bool:
        """Begin to read adapters that will be asked for; `False` if so much is being read that it is of no use."""
        ...

    def pages(self, mix: Mix) -> int:
        """Return the pages that the adapters take, all of them together."""
        ...

    def pages_to_hold(self, mix: Mix) -> int:
        """Return by how much holding the adapters lowers the number of free pages."""
        ...

    def hold(self, mix: Mix) -> None:
        """Put the adapters into the pool and keep them there."""
        ...

    def release(self, mix: Mix) -> None:
        """Let them go when somebody needs the room."""
        ...


class NoAdapters:
    """Of a scheduler whose requests are all answered by the base."""

    def prepare(self, mix: Mix) -> bool:
        """See `Residents`."""
        return True

    def expect(self, mix: Mix) -> bool:
        """See `Residents`."""
        return False

    def pages(self, mix: Mix) -> int:
        """See `Residents`."""
        return 0

    pages_to_hold = pages

    def hold(self, mix: Mix) -> None:
        """See `Residents`."""

    release = hold


class Scheduler:
    """Queues of waiting and running requests.

    Args:
        pool: pages.
        max_batch_tokens: budget of a step, at least one token per running request.
        max_requests: most requests that run at once.
        adapters: where they are.
        prefixes: pages of prompts that begin alike; `None` computes every prompt by itself.
        swap: room on the host for what preempted requests computed; `None` computes it anew.

    Attributes:
        num_preemptions: requests put back into the queue so far.
    """

    def __init__(
        self,
        pool: PagePool,
        max_batch_tokens: int,
        max_requests: int,
        *,
        adapters: Residents | None = None,
        prefixes: PrefixCache | None = None,
        swap: SwapSpace | None = None,
    ) -> None:
        if max_batch_tokens < max_requests:
            raise ValueError(f"max_batch_tokens {max_batch_tokens} is below max_requests {max_requests}")
        self.pool, self.max_batch_tokens, self.max_requests = pool, max_batch_tokens, max_requests
        self.adapters, self.prefixes, self.swap = adapters or NoAdapters(), prefixes, swap
        self.waiting = FairQueue()
        self.running: list[Request] = []
        self.num_preemptions = 0

    @property
    def has_work(self) -> bool:
        """Whether a request is waiting or running."""
        return bool(len(self.waiting) or self.running)

    def add(self, request: Request) -> None:
        """Queue a request.

        Raises:
            RequestError: it could never fit into the pool.
        """
        self.check_fits(request)
        self.waiting.arrive(request)
        self.waiting.add(request)

    def check_fits(self, request: Request) -> None:
        """Refuse a request that could never run to its end.

        Raises:
            RequestError: it could never fit into the pool.
        """
        adapters = self.adapters.pages(request.mix)
        longest = request.num_virtual + request.max_tokens
        if self.pool.pages_for(longest) + adapters > self.pool.num_pages:
            beside = f" beside the adapters of the request, which take {adapters} of its pages" if adapters else ""
            raise RequestError(
                f"prompt and answer can come to {longest} tokens, but the cache holds {self.pool.capacity}{beside}"
            )

    def schedule(self) -> list[Work]:
        """Choose the work of the next step: answers first, then prompts that are begun, then new ones."""
        step: dict[Request, int] = {}
        preempted = self.num_preemptions
        for request in sorted(self.running, key=lambda r: (not _decodes(r), _rank(r))):
            if request in self.running:  # a better one may have pushed it out
                budget = self.max_batch_tokens - sum(step.values())
                self._give(request, min(budget, request.num_pending), step)
        if self.num_preemptions == preempted:  # or those that just left would come straight back
            self._start(step)
        for request, count in step.items():
            self.waiting.charge(request, count, ANSWER if request.output else PROMPT)
        return [Work(request, count) for request, count in step.items()]

    def _give(self, request: Request, count: int, step: dict[Request, int]) -> None:
        """Put tokens of a running request into the step, as many as there are pages for; push out others if need be."""
        if count <= 0:
            return
        while not (room := self._grow(request, count)):
            last = max(self.running, key=_rank)
            if last is request and not _decodes(request):
                return  # its turn is later than everybody's, and its prompt can wait
            step.pop(last, None)
            self._preempt(last)
            if last is request:
                return
        step[request] = room

    def _grow(self, request: Request, count: int) -> int:
        """Give a request pages for its next tokens; return for how many of them there are."""
        used = request.num_virtual + request.num_computed
        missing = self.pool.pages_for(used + count) - len(request.blocks)
        for _ in range(min(missing, self.pool.num_free)):
            request.blocks.append(self.pool.allocate_after(request.blocks[-1] if request.blocks else None))
        return min(count, len(request.blocks) * self.pool.page_size - used)

    def _start(self, step: dict[Request, int]) -> None:
        """Start waiting requests in their turn; one that does not fit yet is not overtaken, and while it waits the
        adapters of those behind it are read."""
        turns = self.waiting.turns()
        for request in turns:
            if sum(step.values()) >= self.max_batch_tokens:
                break
            if not self.adapters.prepare(request.mix) or (self.prefixes and self.prefixes.is_coming(request)):
                continue
            if not self._make_room(request, step):
                break
            self._admit(request)
            self._give(request, min(self.max_batch_tokens - sum(step.values()), request.num_pending), step)
        for request in turns:
            if not self.adapters.expect(request.mix):
                return

    def _make_room(self, request: Request, step: dict[Request, int]) -> bool:
        """Push out requests of lower priority until one can start; `False` if it has to wait all the same."""
        while not self._has_room(request):
            last = max(self.running, key=_rank, default=None)
            if last is None or last.priority <= request.priority:
                return False
            step.pop(last, None)
            self._preempt(last)
        return True

    def _has_room(self, request: Request) -> bool:
        """Tell whether a request can start, with a page left for each that runs, so that it does not leave at once."""
        found = self._found(request)
        need = self.pool.pages_for(request.num_virtual + request.num_tokens) - len(found)
        need += sum(not block.holders for block in found) + self.adapters.pages_to_hold(request.mix)
        return len(self.running) < self.max_requests and need + len(self.running) <= self.pool.num_free

    def _found(self, request: Request) -> list[Block]:
        return self.prefixes.find(request) if self._shares(request) and self.prefixes else []

    def _shares(self, request: Request) -> bool:
        """Tell whether a request begins with pages of the prefix cache; what was swapped out comes back instead."""
        swapped = self.swap is not None and self.swap.pages_of(request)
        return self.prefixes is not None and request.shares_pages and not swapped

    def _admit(self, request: Request) -> None:
        self.waiting.remove(request)
        self.running.append(request)
        if self._shares(request) and self.prefixes:
            self.prefixes.take(request)  # before the adapters come, which could push it out
        self.adapters.hold(request.mix)
        if self.swap and (count := self.swap.pages_of(request)):
            for _ in range(count):
                request.blocks.append(self.pool.allocate_after(request.blocks[-1] if request.blocks else None))
            self.swap.load(request)

    def _preempt(self, request: Request) -> None:
        """Put a running request back into the queue, at the front of its line."""
        self.num_preemptions += 1
        request.num_preemptions += 1
        if self.swap:
            self.swap.save(request, self.pool.page_size)
        self._leave(request)
        self.waiting.add(request, front=True)

    def _leave(self, request: Request) -> None:
        """Take a request's pages and adapters away."""
        self.running.remove(request)
        if self.prefixes:
            self.prefixes.leave(request)
        for block in reversed(request.blocks):  # so that the end of a prompt is evicted before its beginning
            self.pool.release(block)
        request.blocks, request.num_computed = [], 0
        self.adapters.release(request.mix)

    def computed(self, step: list[Work]) -> None:
        """Note that the tokens of a step are computed, so that other requests can share them."""
        for work in step:
            if self.prefixes and work.request.shares_pages:
                self.prefixes.note(work.request, work.request.num_computed - work.count)

    def finish(self, request: Request) -> bool:
        """Forget a request, waiting or running, and let go what it holds; `False` if it was neither."""
        if request in self.running:
            self._leave(request)
        elif request in self.waiting:
            self.waiting.remove(request)
        else:
            return False
        if self.swap:
            self.swap.drop(request)
        self.waiting.depart(request)
        return True

    def check(self) -> None:
        """Verify that pages belong to running requests and adapters alone, and are enough for what was computed."""
        self.pool.check()
        for request in self.running:
            assert request.num_virtual + request.num_computed <= len(request.blocks) * self.pool.page_size
            assert request.num_tokens <= request.max_tokens
        assert not any(request.blocks for request in self.waiting), "a request that does not run holds pages"


def _decodes(request: Request) -> bool:
    return bool(request.output) and request.num_pending == 1


def _rank(request: Request) -> tuple[float, ...]:
    return request.priority, request.arrived
