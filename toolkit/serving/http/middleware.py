"""What every request passes: an id, a log line and metrics; then the key, the pace and the size."""

from __future__ import annotations

import hashlib
import hmac
import time
from collections.abc import Sequence

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from toolkit.serving.http.errors import ID_HEADER, ApiError
from toolkit.serving.http.limits import Pace
from toolkit.serving.http.metrics import Metrics
from toolkit.serving.http.records import Record, access, request_id

OPEN = ("/health", "/ready")
"""What anyone may ask."""


class Recorder:
    """Gives each request an id and a record; logs and counts it when its last byte is sent.

    Args:
        app: what is recorded.
        metrics: that count it.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        record = Record(request_id(Headers(scope=scope).get(ID_HEADER)), scope["method"])
        scope.setdefault("state", {})["record"] = record

        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
                MutableHeaders(scope=message)[ID_HEADER] = record.id
            await send(message)

        try:
            await self.app(scope, receive, sending)
        finally:
            record.ended = time.monotonic()
            record.endpoint = getattr(scope.get("route"), "path", "other")
            access.info("request", extra={"fields": record.line()})
            self.metrics.observe(record)


class Gate:
    """Lets requests pass that carry one of the keys.

    Args:
        app: what is guarded.
        keys: that are taken; without any, everybody passes.
    """

    def __init__(self, app: ASGIApp, keys: Sequence[str]) -> None:
        self.app, self.keys = app, [key.encode() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] == "http" and self.keys and scope["path"] not in OPEN:
            kind, _, given = Headers(scope=scope).get("authorization", "").partition(" ")
            found = given.strip().encode("latin-1")  # as headers are read; gives the client's bytes back
            # All keys are compared, so that the time tells nothing of which is right.
            matches = [hmac.compare_digest(found, key) for key in self.keys]
            if kind.lower() != "bearer" or not any(matches):
                refusal = ApiError(
                    401, "missing or wrong API key", "invalid_api_key", headers={"WWW-Authenticate": "Bearer"}
                )
                await refusal.response()(scope, receive, send)
                return
            scope["state"]["record"].key = hashlib.sha256(found).hexdigest()[:8]
        await self.app(scope, receive, send)


class RateLimit:
    """Refuses requests for work that come too fast; questions about the server are free.

    Args:
        app: what is guarded.
        per_minute: requests of one key, or `None` for as many as come.
    """

    def __init__(self, app: ASGIApp, per_minute: int | None) -> None:
        self.app = app
        self.pace = Pace(per_minute) if per_minute else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if self.pace and scope["type"] == "http" and scope["method"] == "POST":
            try:
                self.pace.take(scope["state"]["record"].key)
            except ApiError as error:
                await error.response()(scope, receive, send)
                return
        await self.app(scope, receive, send)


class BodyLimit:
    """Refuses bodies that are too large, as soon as they are known to be.

    Args:
        app: what is guarded.
        most: bytes of a body.
    """

    def __init__(self, app: ASGIApp, most: int) -> None:
        self.app, self.most = app, most

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        message = f"the body is larger than the {self.most:,} bytes that this server takes"
        declared = Headers(scope=scope).get("content-length", "0")
        if not declared.isdigit() or int(declared) > self.most:
            await ApiError(413, message, "body_too_large", {"Connection": "close"}).response()(scope, receive, send)
            return
        received = 0

        async def receiving() -> Message:
            nonlocal received
            part = await receive()
            received += len(part.get("body", b""))
            if received > self.most:
                raise HTTPException(413, message, {"Connection": "close"})
            return part

        await self.app(scope, receiving, send)
