"""One HTTP request on its way through the engine: its prompts, its answers, and what comes of them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

from toolkit.errors import RequestError
from toolkit.routing.router import Choice
from toolkit.serving.engine import Engine
from toolkit.serving.http.bodies import GenerateBody
from toolkit.serving.http.errors import ApiError, of_request
from toolkit.serving.http.limits import Queue, QueueFullError
from toolkit.serving.http.records import Record
from toolkit.serving.loop import EngineLoop
from toolkit.serving.request import Delta
from toolkit.serving.ticket import Ticket

Item = Delta | Choice


@dataclass
class Call:
    """Requests to the engine, one per answer; the engine's thread puts what it makes of them into an asyncio queue.

    Attributes:
        loop: the engine.
        queue: whose bound the answers count for.
        body: what was asked.
        record: of the HTTP request, for its log line and the metrics.
        tickets: one per answer: the `n` of the first prompt, then those of the next.
    """

    loop: EngineLoop
    queue: Queue
    body: GenerateBody
    record: Record

    def __post_init__(self) -> None:
        self.tickets: list[Ticket] = []
        self._items: asyncio.Queue[tuple[int, Item]] = asyncio.Queue()

    async def submit(self) -> None:
        """Queue all answers, or none.

        Raises:
            ApiError: one of them cannot be answered, or the queue is full.
        """
        events = asyncio.get_running_loop()

        def receiver(index: int) -> Callable[[Item], Any]:
            return lambda item: events.call_soon_threadsafe(self._items.put_nowait, (index, item))

        try:
            if self.body.guide is not None:
                # Not in the engine's thread, where all answers would wait for it.
                await asyncio.to_thread(self.loop.engine.guides.compile, self.body.guide)
            self.tickets = await asyncio.wrap_future(self.loop.call(lambda engine: self._enter(engine, receiver)))
        except RequestError as error:
            raise of_request(error) from None
        except QueueFullError as error:
            raise self.queue.refusal(error) from None
        self.record.prompt_tokens = self.prompt_tokens

    def _enter(self, engine: Engine, receiver: Callable[[int], Callable[[Item], Any]]) -> list[Ticket]:
        """Submit every answer; runs in the engine's thread."""
        body = self.body
        asked = [(prompt, i) for prompt in body.prompts for i in range(body.n)]
        self.queue.check(engine, len(asked))
        tickets: list[Ticket] = []
        try:
            for index, (prompt, i) in enumerate(asked):
                put = receiver(index)
                ticket = engine.submit(
                    prompt,
                    body.asked_model,
                    body.sampling(i),
                    on_delta=put,
                    on_choice=put,
                    key=self.record.key or "",
                    priority=body.priority,
                    timeout=body.timeout,
                )
                tickets.append(ticket)
        except BaseException:
            for ticket in tickets:
                engine.cancel(ticket)
            raise
        return tickets

    @property
    def prompt_tokens(self) -> int:
        """Tokens of all prompts; one that is answered `n` times counts once."""
        return sum(len(ticket.request.prompt) for ticket in self.tickets[:: self.body.n])

    def cancel(self) -> None:
        """Give up what is not finished."""
        tickets = self.tickets
        self.loop.call(lambda engine: [engine.cancel(ticket) for ticket in tickets])

    async def items(self) -> AsyncIterator[tuple[int, Item]]:
        """Yield what the answers grow by, each item with the index of its answer, until all are finished.

        Raises:
            ApiError: an answer ended with an error; the others are given up.
        """
        unfinished = len(self.tickets)
        while unfinished:
            index, item = await self._items.get()
            if isinstance(item, Delta):
                self._note(index, item)
                unfinished -= item.finished is not None
            yield index, item

    def _note(self, index: int, delta: Delta) -> None:
        record = self.record
        if delta.finished == "error":
            status, code = (504, "timeout") if delta.timed_out else (500, "engine_error")
            raise ApiError(status, delta.error, code)
        if delta.num_tokens and record.first_token is None:
            record.first_token = time.monotonic()
        if delta.finished:
            record.tokens += delta.num_tokens
            record.served.append((self.tickets[index].model, delta.num_tokens))
            self.queue.finished()
