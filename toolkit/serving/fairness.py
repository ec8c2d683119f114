"""Whose request starts next: by priority, then by who was served least, then by arrival.

Every key and, within a key, every model has a counter of the tokens that it was given (Sheng et al., "Fairness in
Serving Large Language Models", 2024, arXiv:2401.00588). One that was away does not come back with a claim to all that
it missed: its counter is lifted to the lowest of those who are there.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterator
from heapq import heapify, heappop, heappush

from toolkit.serving.request import Request

PROMPT, ANSWER = 1, 2
"""What a token counts: one of an answer takes a step of its own."""

Turn = tuple[float, ...]


class FairQueue:
    """Waiting requests.

    Attributes:
        served: tokens given, by key, and by key and model.
    """

    def __init__(self) -> None:
        self._waiting: dict[tuple[int, str, str], OrderedDict[Request, None]] = {}
        self._present: Counter[tuple[str, ...]] = Counter()
        self.served: dict[tuple[str, ...], float] = {}
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def __iter__(self) -> Iterator[Request]:
        return (request for line in self._waiting.values() for request in line)

    def __contains__(self, request: Request) -> bool:
        return request in self._waiting.get(_line(request), ())

    def arrive(self, request: Request) -> None:
        """Note that a request is there, waiting or running, until it leaves."""
        for client in _clients(request):
            self._lift(client)
            self._present[client] += 1

    def depart(self, request: Request) -> None:
        """Note that a request is gone."""
        for client in _clients(request):
            self._present[client] -= 1
            if not self._present[client]:
                del self._present[client]
        if len(self.served) > 2 * len(self._present) + 64:
            self._forget()

    def _lift(self, client: tuple[str, ...]) -> None:
        if client not in self._present:
            self.served[client] = max(self.served.get(client, 0.0), self._lowest(client))

    def _lowest(self, client: tuple[str, ...]) -> float:
        """Return the lowest counter of those who are there and whom a client competes with."""
        rivals = (o for o in self._present if len(o) == len(client) and o[:-1] == client[:-1])
        return min((self.served.get(rival, 0.0) for rival in rivals), default=0.0)

    def _forget(self) -> None:
        """Drop the counters of absent clients that coming back would lift anyway, or all when nobody is there."""
        lowest: dict[tuple[str, ...], float] = {}
        for client in self._present:
            rivals, served = client[:-1], self.served.get(client, 0.0)
            lowest[rivals] = min(served, lowest.get(rivals, served))
        for client in [c for c in self.served if c not in self._present]:
            if not self._present or self.served[client] <= lowest.get(client[:-1], 0.0):
                del self.served[client]

    def add(self, request: Request, *, front: bool = False) -> None:
        """Put a request at the end of its line, or at its front."""
        line = self._waiting.setdefault(_line(request), OrderedDict())
        line[request] = None
        if front:
            line.move_to_end(request, last=False)
        self._size += 1

    def remove(self, request: Request) -> None:
        """Take a request out of its line."""
        line = self._waiting[_line(request)]
        del line[request]
        if not line:
            del self._waiting[_line(request)]
        self._size -= 1

    def turns(self) -> Iterator[Request]:
        """Yield requests whose turn it is, one after another; each line again only as long as it is served.

        The caller removes a request that it takes and charges for it before it asks for the next; one that it leaves
        closes its line until `turns` is called anew.
        """
        heap = [(self._turn(line), line) for line in self._waiting]
        heapify(heap)
        while heap:
            turn, line = heappop(heap)
            if line not in self._waiting:
                continue
            if (now := self._turn(line)) > turn:  # it was served meanwhile
                heappush(heap, (now, line))
                continue
            request = next(iter(self._waiting[line]))
            yield request
            if line in self._waiting and request not in self._waiting[line]:
                heappush(heap, (self._turn(line), line))

    def _turn(self, line: tuple[int, str, str]) -> Turn:
        priority, key, model = line
        first = next(iter(self._waiting[line]))
        return (priority, self.served.get((key,), 0.0), self.served.get((key, model), 0.0), first.arrived)

    def charge(self, request: Request, tokens: int, each: int) -> None:
        """Count tokens that a request was given."""
        for client in _clients(request):
            self.served[client] = self.served.get(client, 0.0) + tokens * each


def _line(request: Request) -> tuple[int, str, str]:
    return request.priority, request.key, request.mix.identity


def _clients(request: Request) -> tuple[tuple[str, ...], ...]:
    return (request.key,), (request.key, request.mix.identity)
