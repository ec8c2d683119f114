"""Many clients of one server for a while: `python -m tests.serving.soak [--seconds 1200] [--clients 50]`.

They ask for the base, adapters, compositions and `auto`, whole and streamed; leave in the middle of answers; send
bodies that are wrong; load, reload and unload adapters. Greedy answers must be those of the run alone, refusals must be
those that were asked for, and when all is over nothing may be left: no page, no request, no task, no memory.
"""

from __future__ import annotations

import argparse
import asyncio
import ctypes
import gc
import json
import os
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil

from tests import tiny
from tests.serving.test_server import word_router
from toolkit.serving.engine import Engine
from toolkit.serving.serve import background_server
from toolkit.serving.spec import Limits

MODELS = ["base", "plain", "wide", "few", "dora", "plain:0.6+wide:0.4", "few+rslora", "auto"]
TEXTS = ["once upon a time", "the wide road", "0123456789", "na\u00efve caf\u00e9", "x", "a longer prompt " * 6]
LENGTHS = [1, 7, 24]
DECISIVE = 1e-3
"""Least difference of the two largest logits of every token of an answer that can be compared: closer ones may change
places with the batch that they are computed in."""

PATIENCE = 5.0
"""Seconds that a client waits for an answer of the last priority, which all others keep waiting while the server is
full; for any other answer it waits a minute."""

MOST_GROWTH = 48 * 2**20
"""Bytes that the process may grow by between the end of the warm-up and the end."""

Key = tuple[str, str, int]


@dataclass
class Book:
    """What clients know and what they found.

    Attributes:
        expected: answers of the run alone, by model, prompt and length.
        counts: of acts and statuses.
        faults: what should not have been.
    """

    expected: dict[Key, str] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)

    def compare(self, key: Key, text: str, versions: Sequence[str] = ()) -> None:
        """Note an answer that is not one of those it can be."""
        self.counts["compared"] += 1
        known = [self.expected[name, key[1], key[2]] for name in versions or [key[0]]]
        if text not in known:
            self.faults.append(f"{key}: {text!r} instead of {known}")


def body_of(key: Key, **more: Any) -> dict[str, Any]:
    """The body that asks for an answer."""
    model, prompt, length = key
    ask = {"model": model, "prompt": prompt, "max_tokens": length, "temperature": 0, "ignore_eos": True}
    return ask | more


def answers_alone(http: httpx.Client, models: Sequence[str]) -> dict[Key, str]:
    """Ask for everything, one at a time; keep what is decisive."""
    found: dict[Key, str] = {}
    for key in ((model, prompt, length) for model in models for prompt in TEXTS for length in LENGTHS):
        choice = http.post("/v1/completions", json=body_of(key, logprobs=2)).raise_for_status().json()["choices"][0]
        tops = [sorted(top.values(), reverse=True) for top in choice["logprobs"]["top_logprobs"]]
        # Two tokens of one text would be one entry.
        if all(len(top) > 1 and top[0] - top[1] > DECISIVE for top in tops):
            found[key] = choice["text"]
    return found


class UnexpectedError(Exception):
    """A request was not answered as it should be."""


class Client:
    """One client: what it does next is drawn from its own seed.

    Args:
        number: of the client.
        http: connections.
        book: shared by all.
        folders: two versions of an adapter, which the client loads under a name of its own.
        root: from which adapters may be loaded.
    """

    def __init__(
        self, number: int, http: httpx.AsyncClient, book: Book, folders: Mapping[str, Path], root: Path
    ) -> None:
        self.rng, self.http, self.book, self.folders = random.Random(number), http, book, folders
        self.name, self.folder = f"own{number}", root / f"own{number}"
        self.keys = sorted(key for key in book.expected if key[0] in MODELS)
        self.version: str | None = None

    async def run(self, until: float) -> None:
        """Act until a time of the monotonic clock; then unload what it loaded."""
        acts: list[tuple[Callable[[], Awaitable[None]], int]] = [
            (self.whole, 6),
            (self.streamed, 6),
            (self.several, 2),
            (self.embedded, 1),
            (self.leaves, 3),
            (self.wrong, 3),
            (self.too_late, 1),
            (self.loads, 2),
            (self.asks_own, 3),
            (self.unloads, 1),
        ]
        while time.monotonic() < until:
            act = self.rng.choices([act for act, _ in acts], [weight for _, weight in acts])[0]
            self.book.counts[act.__name__] += 1
            try:
                await act()
            except (httpx.HTTPError, UnexpectedError) as error:
                self.book.faults.append(f"{act.__name__}: {type(error).__name__} {error}")
        await self.unloads()

    async def ask(
        self, path: str, body: Any, *statuses: int, method: str = "POST", patience: float = 60.0
    ) -> httpx.Response:
        """Send a request, which must be answered by one of the statuses; wait and try again where it is told to."""
        while True:
            response = await self.http.request(method, path, json=body, timeout=patience)
            self.book.counts[f"status {response.status_code}"] += 1
            if response.status_code != 429 or 429 in statuses:
                break
            await asyncio.sleep(min(1.0, float(response.headers["retry-after"])))
        if response.status_code not in (statuses or (200,)):
            raise UnexpectedError(f"{method} {path} {str(body)[:200]}: {response.status_code} {response.text[:300]}")
        return response

    async def whole(self) -> None:
        """Ask for an answer in one piece."""
        key, priority = self.rng.choice(self.keys), self.rng.choice([0, 0, -1, 1])
        body, is_last = body_of(key, priority=priority), priority == 1
        try:
            response = await self.ask("/v1/completions", body, patience=PATIENCE if is_last else 60.0)
        except httpx.ReadTimeout:
            if not is_last:
                raise
            self.book.counts["gave_up"] += 1
            return
        self.book.compare(key, response.json()["choices"][0]["text"])

    async def streamed(self) -> None:
        """Ask for an answer as it comes."""
        key = self.rng.choice(self.keys)
        async with self.http.stream("POST", "/v1/completions", json=body_of(key, stream=True)) as response:
            if response.status_code == 429:
                return
            events = [line.removeprefix("data: ") async for line in response.aiter_lines() if line]
        if events[-1] != "[DONE]":
            self.book.faults.append(f"{key}: the stream ends with {events[-1]}")
        texts = [choice["text"] for event in events[:-1] for choice in json.loads(event).get("choices", [])]
        self.book.compare(key, "".join(texts))

    async def several(self) -> None:
        """Ask for several answers at once."""
        model, prompt, length = self.rng.choice(self.keys)
        others = [text for text in TEXTS if (model, text, length) in self.book.expected]
        response = await self.ask("/v1/completions", body_of((model, prompt, length), n=2, prompt=others))
        choices = response.json()["choices"]
        for index, choice in enumerate(choices):
            self.book.compare((model, others[index // 2], length), choice["text"])

    async def embedded(self) -> None:
        """Ask for vectors."""
        await self.ask("/v1/embeddings", {"model": self.rng.choice(["base", "plain"]), "input": TEXTS[:2]})

    async def leaves(self) -> None:
        """Go away in the middle of an answer."""
        body = {
            "model": self.rng.choice(MODELS),
            "prompt": self.rng.choice(TEXTS),
            "max_tokens": 90,
            "ignore_eos": True,
        }
        if self.rng.random() < 0.5:
            async with self.http.stream("POST", "/v1/completions", json=body | {"stream": True}) as response:
                async for _ in response.aiter_lines():
                    if self.rng.random() < 0.2:
                        return
        asked = asyncio.ensure_future(self.http.post("/v1/completions", json=body))
        await asyncio.sleep(self.rng.random() * 0.2)
        asked.cancel()
        await asyncio.gather(asked, return_exceptions=True)

    async def wrong(self) -> None:
        """Send what must be refused."""
        path, body, status = self.rng.choice(WRONG)
        try:
            await self.ask(path, body, status)
        except (httpx.ReadError, httpx.WriteError):
            if status != 413:  # the server closes the connection while the rest of the body is on its way
                raise

    async def too_late(self) -> None:
        """Allow no time: the one failure that is asked for."""
        await self.ask("/v1/completions", body_of(("base", "x", 90), timeout=1e-6), 504)

    async def loads(self) -> None:
        """Put one of two versions into the client's own folder and load it."""
        version = self.rng.choice(sorted(self.folders))
        await asyncio.to_thread(_replace, self.folders[version], self.folder)
        new = self.version is None
        await self.ask("/v1/adapters", {"name": self.name, "path": self.folder.name}, 201 if new else 200)
        self.version = version

    async def asks_own(self) -> None:
        """Ask the client's own adapter, of which it knows the version, or which is not there."""
        keys = [key for key in self.book.expected if key[0] == (self.version or "plain")]
        _, prompt, length = self.rng.choice(keys)
        own = (self.name, prompt, length)
        response = await self.ask("/v1/completions", body_of(own), 200 if self.version else 404)
        if self.version:
            self.book.compare(own, response.json()["choices"][0]["text"], [self.version])

    async def unloads(self) -> None:
        """Unload the client's own adapter."""
        await self.ask(f"/v1/adapters/{self.name}", None, 200 if self.version else 404, method="DELETE")
        self.version = None


WRONG: list[tuple[str, Any, int]] = [
    ("/v1/completions", {"model": "base"}, 400),
    ("/v1/completions", [], 400),
    ("/v1/completions", {"model": "absent", "prompt": "x"}, 404),
    ("/v1/completions", {"model": "base", "prompt": "x", "max_tokens": 10**6}, 400),
    ("/v1/completions", {"model": "base", "prompt": [10**6]}, 400),
    ("/v1/completions", {"model": "base", "prompt": "x", "temperature": -1}, 400),
    ("/v1/completions", {"model": "base", "prompt": "x" * 300_000}, 413),
    ("/v1/chat/completions", {"model": "base", "messages": []}, 400),
    ("/v1/embeddings", {"model": "base", "input": []}, 400),
    ("/v1/adapters", {"name": "out", "path": "../.."}, 403),
    ("/v1/adapters", {"name": "a+b", "path": "versions/first"}, 400),
]


def _replace(source: Path, folder: Path) -> None:
    """Put a copy of a folder in the place of another in one step."""
    fresh = folder.with_name(folder.name + ".new")
    shutil.rmtree(fresh, ignore_errors=True)
    shutil.copytree(source, fresh)
    shutil.rmtree(folder, ignore_errors=True)
    fresh.rename(folder)


@dataclass(frozen=True)
class State:
    """What a server holds while nobody asks anything."""

    tasks: int
    threads: int
    files: int
    resident: int

    @classmethod
    def of(cls, engine: Engine) -> State:
        """Wait until the engine is idle, verify its books, and look."""
        ends = time.monotonic() + 20
        while engine.has_work and time.monotonic() < ends:
            time.sleep(0.05)
        time.sleep(0.5)  # connections close
        assert not engine.has_work, "requests are left"
        engine.check()
        assert engine.scheduler.pool.num_free == engine.scheduler.pool.num_pages, "pages are left"
        assert not engine._tickets, "tickets are left"
        gc.collect()
        if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
            trim(0)  # what is free goes back to the system, so that it is not counted
        tasks = sum(type(found) is asyncio.Task and not found.done() for found in gc.get_objects())
        process = psutil.Process()
        return cls(tasks, process.num_threads(), process.num_fds(), process.memory_info().rss)


@contextmanager
def server(work: Path, max_waiting: int):
    """Yield an engine, its address and the root of its adapters; its pool is too small for all that is asked."""
    base = tiny.save_model(tiny.llama(), work / "base")
    kinds: dict[str, dict[str, Any]] = {
        "plain": {},
        "wide": {"r": 7, "lora_alpha": 3},
        "few": {"r": 2, "target_modules": ["q_proj", "down_proj"]},
        "rslora": {"use_rslora": True},
        "dora": {"r": 3, "use_dora": True},
    }
    own = {name: tiny.save_lora(base, work / name, seed=i, **kind) for i, (name, kind) in enumerate(kinds.items())}
    for seed, name in enumerate(("first", "second")):
        tiny.save_lora(base, work / "root" / "versions" / name, seed=50 + seed)
    limits = Limits(max_requests=12, page_size=4, max_batch_tokens=96, cache_tokens=1600)
    with Engine(str(base), own, word_router(base), limits=limits) as engine:
        access = {"adapter_roots": [work / "root"], "max_waiting": max_waiting, "max_body": 200_000}
        with background_server(engine, **access) as url:
            yield engine, url, work / "root"


def soak(seconds: float, clients: int, work: Path) -> Book:
    """Run the clients for a while after a shorter while that is not judged for what it leaves.

    Raises:
        AssertionError: something is left.
    """
    book = Book()
    with server(work, max_waiting=clients) as (engine, url, root):
        versions = {name: root / "versions" / name for name in ("first", "second")}
        with httpx.Client(base_url=url, trust_env=False, timeout=60) as http:
            for name in versions:
                http.post("/v1/adapters", json={"name": name, "path": f"versions/{name}"}).raise_for_status()
            book.expected = answers_alone(http, [*MODELS, *versions])
            for name in versions:
                http.delete(f"/v1/adapters/{name}").raise_for_status()
        served = set(engine.adapters.infos)

        async def together(length: float, seed: int) -> None:
            limits = httpx.Limits(max_connections=None)
            async with httpx.AsyncClient(base_url=url, trust_env=False, timeout=60, limits=limits) as http:
                until = time.monotonic() + length
                everybody = [Client(seed + i, http, book, versions, root) for i in range(clients)]
                await asyncio.gather(*(client.run(until) for client in everybody))

        asyncio.run(together(max(4.0, seconds / 6), 0))
        before = State.of(engine)
        asyncio.run(together(seconds, 1000))
        after = State.of(engine)
        assert set(engine.adapters.infos) == served, "adapters are left"
    book.faults += leaks(before, after)
    return book


def leaks(before: State, after: State) -> list[str]:
    """What there is more of than before."""
    # A pool of threads for what waits on the disk grows to its bound when there is much at once.
    allowed = {"tasks": 0, "threads": min(32, (os.cpu_count() or 1) + 4), "files": 4, "resident": MOST_GROWTH}
    grown = {name: getattr(after, name) - getattr(before, name) for name in allowed}
    return [f"{name}: {grown[name]:,} more than before" for name, most in allowed.items() if grown[name] > most]


def main() -> None:
    """Soak, print what was done, and fail if anything was wrong."""
    parser = argparse.ArgumentParser(prog="tests.serving.soak", description=__doc__)
    parser.add_argument("--seconds", type=float, default=1200)
    parser.add_argument("--clients", type=int, default=50)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        book = soak(asked.seconds, asked.clients, Path(work))
    print(json.dumps(dict(sorted(book.counts.items())), indent=1))
    print("\n".join(book.faults[:50]) or "no faults")
    sys.exit(bool(book.faults))


if __name__ == "__main__":
    main()
