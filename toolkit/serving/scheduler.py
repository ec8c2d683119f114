"""Which tokens of which requests run in the next step. Plain Python on integers and deques.

A step has a budget of tokens. Every running answer gets its next token first, so that no prefill delays it; what
is left goes to prompts in order of arrival, a long one in chunks over several steps (Agrawal et al., "Taming
Throughput-Latency Tradeoff in LLM Inference with Sarathi-Serve", 2024, arXiv:2403.02310).

A request starts only when the pool has the pages for its prompt and its longest answer, so a running request
never runs out of them.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from toolkit.errors import RequestError
from toolkit.serving.pages import PagePool
from toolkit.serving.request import Request


@dataclass(frozen=True)
class Work:
    """The next `count` uncomputed tokens of a request."""

    request: Request
    count: int

    @property
    def completes(self) -> bool:
        """Whether all tokens are computed after it, so that the next one can be sampled."""
        return self.count == self.request.num_pending


class Scheduler:
    """Queues of waiting and running requests.

    Args:
        pool: pages.
        max_batch_tokens: budget of a step, at least one token per running request.
        max_requests: most requests that run at once.
    """

    def __init__(self, pool: PagePool, max_batch_tokens: int, max_requests: int) -> None:
        if max_batch_tokens < max_requests:
            raise ValueError(f"max_batch_tokens {max_batch_tokens} is below max_requests {max_requests}")
        self.pool, self.max_batch_tokens, self.max_requests = pool, max_batch_tokens, max_requests
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []

    @property
    def has_work(self) -> bool:
        """Whether a request is waiting or running."""
        return bool(self.waiting or self.running)

    def add(self, request: Request) -> None:
        """Queue a request.

        Raises:
            RequestError: it could never fit into the pool.
        """
        self.check_fits(request)
        self.waiting.append(request)

    def check_fits(self, request: Request) -> None:
        """Refuse a request that could never start.

        Raises:
            RequestError: it could never fit into the pool.
        """
        if self.pool.pages_for(request.max_tokens) > self.pool.num_pages:
            raise RequestError(
                f"prompt and answer can come to {request.max_tokens} tokens, but the cache holds {self.pool.capacity}"
            )

    def schedule(self) -> list[Work]:
        """Choose the work of the next step: answers first, then prompts in order of arrival."""
        budget = self.max_batch_tokens
        step = [Work(request, 1) for request in self.running if request.output]
        prefilling = [request for request in self.running if not request.output]
        budget -= len(step)
        for request in prefilling:
            budget -= self._give(request, budget, step)
        while budget > 0 and self._can_start():
            request = self.waiting.popleft()
            self.pool.allocate(request, request.max_tokens)
            self.running.append(request)
            budget -= self._give(request, budget, step)
        return step

    def _can_start(self) -> bool:
        return (
            bool(self.waiting)
            and len(self.running) < self.max_requests
            and self.pool.can_allocate(self.waiting[0].max_tokens)
        )

    @staticmethod
    def _give(request: Request, budget: int, step: list[Work]) -> int:
        count = min(budget, request.num_pending)
        if count > 0:
            step.append(Work(request, count))
        return count

    def finish(self, request: Request) -> None:
        """Forget a request, waiting or running, and free its pages."""
        if request in self.running:
            self.running.remove(request)
            self.pool.free(request)
        elif request in self.waiting:
            self.waiting.remove(request)

    def check(self) -> None:
        """Verify that pages belong to running requests alone, and are enough for what they computed."""
        self.pool.check()
        held = sum(len(self.pool.table(request)) for request in self.running)
        assert held + self.pool.num_free == self.pool.num_pages, "a request that does not run holds pages"
        for request in self.running:
            assert request.num_computed <= len(self.pool.table(request)) * self.pool.page_size
            assert request.num_tokens <= request.max_tokens
