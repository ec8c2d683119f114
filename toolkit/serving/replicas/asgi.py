"""An ASGI application that is asked from the same process, without a socket."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope


@dataclass(frozen=True)
class Asked:
    """A whole request.

    Attributes:
        method: of HTTP.
        path: percent-decoded.
        query: after the question mark.
        headers: names in lower case.
        body: whole.
    """

    method: str
    path: str
    query: bytes
    headers: tuple[tuple[bytes, bytes], ...]
    body: bytes


@dataclass(frozen=True)
class Head:
    """What an answer begins with.

    Attributes:
        status: of HTTP.
        headers: names in lower case.
    """

    status: int
    headers: tuple[tuple[bytes, bytes], ...]

    @property
    def is_stream(self) -> bool:
        """Whether events follow, one by one."""
        return dict(self.headers).get(b"content-type", b"").startswith(b"text/event-stream")


Part = Head | bytes
"""Of an answer: its head, then its body piece by piece."""


async def read(scope: Scope, receive: Receive) -> Asked:
    """Read a request to its end."""
    body = bytearray()
    while (message := await receive())["type"] == "http.request":
        body += message.get("body", b"")
        if not message.get("more_body"):
            break
    headers = tuple((bytes(name), bytes(value)) for name, value in scope["headers"])
    return Asked(scope["method"], scope["path"], scope["query_string"], headers, bytes(body))


async def answers(app: ASGIApp, asked: Asked) -> AsyncGenerator[Part]:
    """Yield an application's answer as it comes; closing the generator is the client going away."""
    parts: asyncio.Queue[Part | None] = asyncio.Queue()
    gone = asyncio.Event()
    sent = False

    async def receive() -> Message:
        nonlocal sent
        if not sent:
            sent = True
            return {"type": "http.request", "body": asked.body, "more_body": False}
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        if message["type"] == "http.response.start":
            await parts.put(Head(message["status"], tuple((bytes(n), bytes(v)) for n, v in message["headers"])))
        elif message.get("body"):
            await parts.put(bytes(message["body"]))

    task = asyncio.ensure_future(app(_scope(asked), receive, send))
    task.add_done_callback(lambda _: parts.put_nowait(None))
    try:
        while (part := await parts.get()) is not None:
            yield part
        task.result()
    finally:
        gone.set()
        if not task.done():
            task.cancel()
        with suppress(asyncio.CancelledError, Exception):
            await task


def _scope(asked: Asked) -> dict[str, Any]:
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": asked.method,
        "scheme": "http",
        "path": asked.path,
        "raw_path": asked.path.encode(),
        "query_string": asked.query,
        "root_path": "",
        "headers": list(asked.headers),
        "server": None,
        "client": None,
    }
