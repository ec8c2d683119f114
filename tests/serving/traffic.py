"""A device without a model: pages whose slots remember what was written there, so that any mix-up is seen."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from toolkit.serving.mix import Mix
from toolkit.serving.pages import Block, PagePool
from toolkit.serving.request import Request, Sampling
from toolkit.serving.scheduler import Scheduler


def request(name: str, prompt: int | list[int], answer: int, adapter: str = "", **fields: Any) -> Request:
    tokens = list(range(prompt)) if isinstance(prompt, int) else prompt
    mix = Mix(((adapter, 1.0),)) if adapter else Mix()
    return Request(name, tokens, mix, Sampling(max_tokens=answer), **fields)


class Device:
    """What every slot of every page holds: the adapters and all tokens up to its own, as keys and values do."""

    def __init__(self, pool: PagePool) -> None:
        self.pool = pool
        self.slots: list[list[Any]] = [[None] * pool.page_size for _ in range(pool.num_pages)]

    def save(self, start: int, count: int) -> Sequence[Any]:
        return [list(page) for page in self.slots[start : start + count]]

    def load(self, start: int, contents: Sequence[Any]) -> None:
        self.slots[start : start + len(contents)] = [list(content) for content in contents]

    def run(self, request: Request, count: int) -> None:
        size, pages, tokens = self.pool.page_size, request.pages, request.tokens
        for at in range(request.num_computed + count):
            held = (request.mix.identity, tuple(tokens[: at + 1]))
            page = self.slots[pages[at // size]]
            if at < request.num_computed:
                assert page[at % size] == held, f"{request.id}: token {at} sees another's keys"
            else:
                page[at % size] = held


class Adapters:
    """Adapters that take pages of the pool and, for a while, are not there yet."""

    def __init__(self, pool: PagePool, sizes: dict[str, int], delay: int = 0) -> None:
        self.pool, self.sizes, self.delay = pool, sizes, delay
        self.blocks: dict[str, Block] = {}
        self.users: dict[str, int] = {}
        self.asked: dict[str, int] = {}
        self.loads = 0

    def prepare(self, mix: Mix) -> bool:
        for key in mix.keys:
            self.asked[key] = self.asked.get(key, 0) + 1
        return all(self.asked[key] > self.delay for key in mix.keys)

    def expect(self, mix: Mix) -> bool:
        return False

    def pages(self, mix: Mix) -> int:
        return sum(self.sizes[key] for key in mix.keys)

    def pages_to_hold(self, mix: Mix) -> int:
        return sum(self.sizes[key] for key in mix.keys if not self.users.get(key))

    def hold(self, mix: Mix) -> None:
        for key in mix.keys:
            if key in self.blocks:
                self.pool.hold(self.blocks[key])
            else:
                self.loads += 1
                self.blocks[key] = self.pool.allocate(self.sizes[key])
                self.blocks[key].on_evict = lambda key=key: self.evicted(key)
            self.users[key] = self.users.get(key, 0) + 1

    def release(self, mix: Mix) -> None:
        for key in mix.keys:
            self.users[key] -= 1
            self.pool.release(self.blocks[key])

    def evicted(self, key: str) -> None:
        assert not self.users[key], "an adapter in use was evicted"
        del self.blocks[key]


def run_step(scheduler: Scheduler, device: Device | None = None) -> dict[str, int]:
    """Do what the engine does with a step's work, without a model: the token of an answer is its length."""
    work = scheduler.schedule()
    for w in work:
        assert 0 < w.count <= w.request.num_pending
        if device:
            device.run(w.request, w.count)
    complete = [w.request for w in work if w.completes]
    for w in work:
        w.request.num_computed += w.count
    scheduler.computed(work)
    for r in complete:
        r.output.append(len(r.output))
        if r.num_tokens == r.max_tokens:
            r.finished = "length"
            scheduler.finish(r)
    scheduler.check()
    return {w.request.id: w.count for w in work}
