"""Send requests when they are due, whatever became of those before, and note when what comes back came."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from toolkit.errors import UnsupportedError
from toolkit.jobs.bench_serve.spec import BenchSpec
from toolkit.jobs.bench_serve.workload import Job
from toolkit.progress import Progress

if TYPE_CHECKING:
    import httpx


@dataclass(frozen=True)
class Outcome:
    """What became of a request; times are seconds after the start of the run.

    They count from when the request was due, so a wait in the client is part of what a user would see.

    Attributes:
        job: what was asked, and when it was due.
        sent: when it was sent.
        first: when the first token came; `None` if none did.
        last: when the last token came, or the request failed.
        prompt_tokens: by the server's count.
        tokens: of the answer, by the server's count, or where it gives none by that of the events.
        error: why it failed.
    """

    job: Job
    sent: float
    first: float | None
    last: float
    prompt_tokens: int = 0
    tokens: int = 0
    error: str = ""

    @property
    def ttft(self) -> float | None:
        """Seconds to the first token."""
        return None if self.first is None or self.error else self.first - self.job.at

    @property
    def tpot(self) -> float | None:
        """Seconds per token after the first."""
        if self.first is None or self.error or self.tokens < 2:
            return None
        return (self.last - self.first) / (self.tokens - 1)

    @property
    def latency(self) -> float:
        """Seconds to the last token."""
        return self.last - self.job.at


def open_client(spec: BenchSpec, transport: httpx.AsyncBaseTransport | None = None) -> httpx.AsyncClient:
    """Return a client of the server.

    Args:
        spec: names it.
        transport: carries the requests, in place of the network.
    """
    try:
        import httpx
    except ModuleNotFoundError as error:
        raise UnsupportedError(f"load tests need {error.name}: pip install 'composition-toolkit[serve]'") from None
    headers = {"Authorization": f"Bearer {spec.api_key}"} if spec.api_key else {}
    return httpx.AsyncClient(
        base_url=spec.url,
        headers=headers,
        timeout=None,  # `drive` keeps the time itself
        limits=httpx.Limits(max_connections=None, max_keepalive_connections=None),
        trust_env=False,
        transport=transport,
    )


async def served_models(client: httpx.AsyncClient) -> list[str]:
    """Return the names that the server lists.

    Raises:
        UnsupportedError: it cannot be reached, or does not list any.
    """
    import httpx

    try:
        response = await client.get("/v1/models", timeout=30)
        response.raise_for_status()
        return [str(entry["id"]) for entry in response.json()["data"]]
    except httpx.HTTPStatusError as error:
        reason = f"answered {error.response.status_code}: {_message(error.response.text)}"
        raise UnsupportedError(f"{client.base_url}: {reason}") from None
    except httpx.HTTPError as error:
        raise UnsupportedError(f"{client.base_url}: cannot be reached ({error or type(error).__name__})") from None
    except (ValueError, KeyError, TypeError):
        raise UnsupportedError(f"{client.base_url}: /v1/models is not in OpenAI's form") from None


async def drive(client: httpx.AsyncClient, spec: BenchSpec, jobs: Sequence[Job], progress: Progress) -> list[Outcome]:
    """Send every request when it is due; return what became of them, in order."""
    clock = asyncio.get_running_loop().time
    slots = asyncio.Semaphore(spec.concurrency or len(jobs))
    start = clock()

    async def one(job: Job) -> Outcome:
        await asyncio.sleep(start + job.at - clock())
        async with slots:
            outcome = await _Exchange(client, spec, job, start).run()
        progress.advance()
        return outcome

    return await asyncio.gather(*map(one, jobs))


class _Exchange:
    """One request and its answer."""

    def __init__(self, client: httpx.AsyncClient, spec: BenchSpec, job: Job, start: float) -> None:
        self.client, self.spec, self.job, self.start = client, spec, job, start
        self.clock = asyncio.get_running_loop().time
        self.first: float | None = None
        self.last = 0.0
        self.events = 0
        self.usage: dict[str, int] = {}

    async def run(self) -> Outcome:
        """Send the request and read the whole answer."""
        import httpx

        sent, error = self._now(), ""
        try:
            async with asyncio.timeout(self.spec.timeout):
                await self._read()
        except TimeoutError:
            error = f"no whole answer within {self.spec.timeout:g} s"
        except (httpx.HTTPError, UnsupportedError) as failure:
            error = str(failure) or type(failure).__name__
        if not error and self.first is None:
            error = "the answer was empty"
        last = self._now() if error else self.last
        tokens = self.usage.get("completion_tokens", self.events)
        return Outcome(self.job, sent, self.first, last, self.usage.get("prompt_tokens", 0), tokens, error)

    def _now(self) -> float:
        return self.clock() - self.start

    async def _read(self) -> None:
        path = "/v1/chat/completions" if self.spec.chat else "/v1/completions"
        async with self.client.stream("POST", path, json=body(self.spec, self.job)) as response:
            if response.status_code != 200:
                text = (await response.aread()).decode(errors="replace")
                raise UnsupportedError(f"{response.status_code}: {_message(text)}")
            async for event in _events(response.aiter_lines()):
                self._note(event)

    def _note(self, event: dict[str, Any]) -> None:
        if "error" in event:
            raise UnsupportedError(_message(json.dumps(event)))
        self.usage |= event.get("usage") or {}
        for choice in event.get("choices", []):
            text = choice.get("text") or (choice.get("delta") or {}).get("content")
            if text or choice.get("finish_reason"):
                self.last = self._now()
                self.first = self.last if self.first is None else self.first
            self.events += bool(text)


def body(spec: BenchSpec, job: Job) -> dict[str, Any]:
    """Return what is sent for a request."""
    asked = {"messages": [{"role": "user", "content": job.prompt}]} if spec.chat else {"prompt": job.prompt}
    asked |= {"model": job.model, "max_tokens": job.max_tokens, "temperature": spec.temperature}
    asked |= {"ignore_eos": True} if spec.ignore_eos else {}
    return asked | {"stream": True, "stream_options": {"include_usage": True}}


async def _events(lines: AsyncIterator[str]) -> AsyncIterator[dict[str, Any]]:
    """Yield the objects of a stream of server-sent events."""
    async for line in lines:
        kind, _, data = line.partition(":")
        if kind == "data" and data.strip() != "[DONE]":
            try:
                yield json.loads(data)
            except ValueError:
                raise UnsupportedError(f"an event of the answer is no JSON: {data.strip()[:60]}") from None


def _message(text: str) -> str:
    """Return what an error's body says, in one line."""
    try:
        found = json.loads(text)["error"]
        text = found["message"] if isinstance(found, dict) else str(found)
    except (ValueError, KeyError, TypeError):
        pass
    return " ".join(text.split())[:300]
