"""The front of several replicas: passes each request to one of them, and to another if that one dies.

An answer that comes whole goes to the client when it is complete, so until then another replica can give it: it is
computed anew, and the client gets one answer. A stream that has begun cannot be taken back; it ends with an error.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing

from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from toolkit.serving.http.errors import ApiError, error_body
from toolkit.serving.replicas.asgi import Asked, Head, Part, read

TRIES = 5
"""Replicas that a request is passed to, before it is given up."""

PAUSE = 0.2
"""Seconds before the second try; before later ones as many times more."""

ATTEMPTS = b"x-toolkit-attempts"
"""Header of an answer: how many replicas its request was passed to."""

ONE_SERVER = {
    "/metrics": "every replica has metrics of its own; Ray's dashboard has those of all",
    "/v1/adapters": "put adapters into a folder of --adapter-folder, which every replica looks after",
    "/v1/load_lora_adapter": "put adapters into a folder of --adapter-folder, which every replica looks after",
    "/v1/unload_lora_adapter": "take adapters out of their --adapter-folder, which every replica looks after",
}
"""What one replica cannot answer for all, and what to do instead; of adapters, the list can be read."""

Ask = Callable[[str, Asked], AsyncGenerator[Part]]
"""Passes a request to a replica, best to one that has served a model before."""

log = logging.getLogger("toolkit.serving")


class Front:
    """An ASGI application.

    Args:
        ask: passes a request on.
        lost: what it raises when the replica dies.
    """

    def __init__(self, ask: Ask, lost: tuple[type[Exception], ...]) -> None:
        self.ask, self.lost = ask, lost

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, until the client goes away."""
        try:
            asked = await read(scope, receive)
        except HTTPException as error:
            await ApiError(error.status_code, str(error.detail)).response()(scope, receive, send)
            return
        refusal = _refusal(asked)
        if refusal is not None:
            await refusal.response()(scope, receive, send)
            return
        tasks = [asyncio.ensure_future(self._answer(asked, send)), asyncio.ensure_future(_disconnected(receive))]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            if tasks[0].done():
                tasks[0].result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _answer(self, asked: Asked, send: Send) -> None:
        for attempt in range(1, TRIES + 1):
            answer = _Answer(send, attempt)
            try:
                async with aclosing(self.ask(affinity(asked), asked)) as parts:
                    async for part in parts:
                        await answer.add(part)
                await answer.end()
                return
            except self.lost:
                log.warning("a replica died", extra={"fields": {"path": asked.path, "attempt": attempt}})
                if answer.begun:
                    await answer.fail("the replica that gave this answer died; ask again", "replica_died")
                    return
            except Exception:
                log.exception("a replica failed")
                await answer.fail("the server failed; see its log", "internal_error")
                return
            await asyncio.sleep(PAUSE * attempt)
        await _Answer(send, TRIES).fail(f"{TRIES} replicas died with this request", "replica_died", 503)


class _Answer:
    """An answer on its way to a client: kept until it is whole, or passed on as it comes.

    Args:
        send: to the client.
        attempt: the replica's number.

    Attributes:
        begun: the client has a part of it.
    """

    def __init__(self, send: Send, attempt: int) -> None:
        self.send, self.attempt, self.begun = send, attempt, False
        self._head: Head | None = None
        self._body = bytearray()

    async def add(self, part: Part) -> None:
        """Take what comes from the replica."""
        if isinstance(part, Head):
            self._head = part
        elif self._head is not None and self._head.is_stream:
            await self._begin(self._head)
            await self.send({"type": "http.response.body", "body": part, "more_body": True})
        else:
            self._body += part

    async def end(self) -> None:
        """Let the client have what was kept; the answer is whole."""
        assert self._head is not None
        await self._begin(self._head)
        await self.send({"type": "http.response.body", "body": bytes(self._body), "more_body": False})

    async def _begin(self, head: Head) -> None:
        if not self.begun:
            self.begun = True
            headers = [*head.headers, (ATTEMPTS, b"%d" % self.attempt)]
            await self.send({"type": "http.response.start", "status": head.status, "headers": headers})

    async def fail(self, message: str, code: str, status: int = 500) -> None:
        """End the answer with an error: as an event of a stream that has begun, else instead of it."""
        error = error_body(message, "server_error", code)
        if self.begun:
            body = f"data: {json.dumps(error)}\n\n".encode()
        else:
            body = json.dumps(error).encode()
            await self._begin(Head(status, ((b"content-type", b"application/json"),)))
        await self.send({"type": "http.response.body", "body": body, "more_body": False})


def _refusal(asked: Asked) -> ApiError | None:
    """Say why a request is none for several replicas."""
    place = next((path for path in ONE_SERVER if asked.path == path or asked.path.startswith(f"{path}/")), None)
    if place is None or (place == "/v1/adapters" and asked.method == "GET"):
        return None
    return ApiError(501, f"{asked.method} {asked.path}: {ONE_SERVER[place]}", "not_with_replicas")


def affinity(asked: Asked) -> str:
    """Return the model that a request asks for, if one replica is better for it than another: whatever has adapters."""
    try:
        body = json.loads(asked.body) if asked.method == "POST" else {}
    except ValueError:
        return ""  # a replica says what is wrong with it
    if not isinstance(body, dict):
        return ""
    mixed = body.get("adapters")
    if isinstance(mixed, list):
        return "+".join(sorted(str(part.get("name")) for part in mixed if isinstance(part, dict)))
    model = body.get("model")
    return model if isinstance(model, str) and model not in ("base", "auto") else ""


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
