"""The HTTP face of the engine, in OpenAI's shape."""

from __future__ import annotations

import asyncio
import hmac
import json
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import quote

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

from toolkit.errors import RequestError
from toolkit.routing.router import Choice
from toolkit.serving.engine import Engine, Ticket
from toolkit.serving.loop import EngineLoop
from toolkit.serving.protocol import ChatBody, CompletionBody, Writer, error_body, model_entry, model_list
from toolkit.serving.request import Delta

CLIENT_CLOSED = 499
"""Status for a client that went away; nobody sees it but the log."""


class ApiError(Exception):
    """An error with its HTTP status."""

    def __init__(self, status: int, message: str, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.code = status, code


def build_app(engine: Engine, *, api_key: str | None = None) -> FastAPI:
    """Return the application; the engine runs in a thread of its own as long as the application does."""
    loop = EngineLoop(engine)
    started = int(time.time())

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        loop.start()
        yield
        await asyncio.to_thread(loop.stop)

    app = FastAPI(title="Composition Toolkit", lifespan=lifespan)
    _add_errors(app)

    @app.middleware("http")
    async def authorize(request: Request, call_next: Any) -> Response:
        given = request.headers.get("authorization", "").encode()
        guarded = api_key is not None and request.url.path.startswith("/v1/")
        if guarded and not hmac.compare_digest(given, f"Bearer {api_key}".encode()):
            return JSONResponse(error_body("missing or wrong API key", "authentication_error", "invalid_api_key"), 401)
        return await call_next(request)

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return model_list(engine.models, started)

    @app.get("/v1/models/{name}")
    async def model(name: str) -> dict[str, Any]:
        if name not in engine.models:
            raise ApiError(404, f"no model {name!r} (served: {', '.join(engine.models)})", "model_not_found")
        return model_entry(name, started)

    @app.post("/v1/completions")
    async def completions(body: CompletionBody, request: Request) -> Response:
        return await _answer(loop, body, Writer(chat=False, model=body.model), request)

    @app.post("/v1/chat/completions")
    async def chat_completions(body: ChatBody, request: Request) -> Response:
        return await _answer(loop, body, Writer(chat=True, model=body.model), request)

    return app


class _Call:
    """One request on its way through the engine; the engine's thread puts deltas into an asyncio queue."""

    def __init__(self, loop: EngineLoop, body: CompletionBody | ChatBody, writer: Writer) -> None:
        self.loop, self.body, self.writer = loop, body, writer
        self.deltas: asyncio.Queue[Delta | Choice] = asyncio.Queue()
        self.ticket: Ticket | None = None

    async def submit(self) -> Ticket:
        events = asyncio.get_running_loop()

        def put(item: Delta | Choice) -> None:
            events.call_soon_threadsafe(self.deltas.put_nowait, item)

        def enter(engine: Engine) -> Ticket:
            body = self.body
            return engine.submit(body.asked, body.model, body.sampling(), on_delta=put, on_choice=put)

        try:
            ticket = await asyncio.wrap_future(self.loop.call(enter))
        except RequestError as error:
            raise ApiError(404 if error.code == "model_not_found" else 400, str(error), error.code) from None
        self.ticket = ticket
        return ticket

    def cancel(self) -> None:
        ticket = self.ticket
        if ticket is not None:
            self.loop.call(lambda engine: engine.cancel(ticket))

    async def next(self) -> Delta:
        """Wait for the next delta, noting the router's choice on the way."""
        while True:
            item = await self.deltas.get()
            if isinstance(item, Delta):
                if item.finished == "error":
                    raise ApiError(500, item.error, "engine_error")
                return item
            self.writer.routed(item)


async def _answer(loop: EngineLoop, body: CompletionBody | ChatBody, writer: Writer, request: Request) -> Response:
    call = _Call(loop, body, writer)
    ticket = await call.submit()
    if body.stream:
        events = _events(call, ticket, body.include_usage)
        return StreamingResponse(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
    whole = asyncio.ensure_future(_collect(call))
    gone = asyncio.ensure_future(_disconnected(request))
    await asyncio.wait({whole, gone}, return_when=asyncio.FIRST_COMPLETED)
    gone.cancel()
    if not whole.done():
        whole.cancel()
        call.cancel()
        return Response(status_code=CLIENT_CLOSED)
    text, last = whole.result()
    assert last.finished is not None
    answer = writer.whole(text, last.finished, len(ticket.request.prompt), last.num_tokens)
    # Percent-encoded, for a name may have characters that a header cannot.
    return JSONResponse(answer, headers={"x-toolkit-model": quote(writer.model, safe="")})


async def _collect(call: _Call) -> tuple[str, Delta]:
    parts: list[str] = []
    while True:
        delta = await call.next()
        parts.append(delta.text)
        if delta.finished:
            return "".join(parts), delta


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _events(call: _Call, ticket: Ticket, include_usage: bool) -> AsyncIterator[str]:
    """Yield the server-sent events of a stream; when the client goes away the request is cancelled."""
    first, finished = True, False
    try:
        while not finished:
            delta = await call.next()
            finished = delta.finished is not None
            if delta.text or finished or first:
                yield _event(call.writer.chunk(delta.text, delta.finished, first=first))
                first = False
            if finished and include_usage:
                yield _event(call.writer.usage_chunk(len(ticket.request.prompt), delta.num_tokens))
        yield "data: [DONE]\n\n"
    except ApiError as error:
        finished = True
        yield _event(error_body(str(error), "server_error", error.code))
    finally:
        if not finished:
            call.cancel()


def _event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n"


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(ApiError)
    async def api_error(request: Request, error: ApiError) -> Response:
        kind = "invalid_request_error" if error.status < 500 else "server_error"
        return JSONResponse(error_body(str(error), kind, error.code), error.status)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        message, param = _explain(error)
        return JSONResponse(error_body(message, "invalid_request_error", None, param), 400)

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        return JSONResponse(error_body(str(error.detail), "invalid_request_error"), error.status_code)

    @app.exception_handler(Exception)
    async def unexpected(request: Request, error: Exception) -> Response:
        # The traceback goes to the log by itself: the framework raises the error again after this answer.
        return JSONResponse(error_body("the server failed; see its log", "server_error", "internal_error"), 500)


def _explain(error: RequestValidationError) -> tuple[str, str | None]:
    """Return what is wrong with a body, and the field that it is about."""
    found = error.errors()
    first = found[0]
    if first["type"] == "json_invalid":
        return f"the body is not valid JSON ({first.get('ctx', {}).get('error', '')})", None
    trail = _trail(first["loc"], error.body)
    if not trail:
        if isinstance(error.body, bytes):
            return "send the body as JSON, with the header Content-Type: application/json", None
        if isinstance(error.body, Mapping):  # pydantic takes no other keys
            return "a key of the body is not valid Unicode", None
        return "the body must be a JSON object", None
    if first["type"] == "extra_forbidden":
        return f"{trail}: not supported by this server", trail
    # A union reports what each of its branches expects.
    messages = dict.fromkeys(str(item["msg"]) for item in found if _trail(item["loc"], error.body) == trail)
    return f"{trail}: {' or '.join(messages)}", trail


def _trail(loc: Sequence[str | int], body: Any) -> str:
    """Keep of an error's location what is a key of the body; the branches of unions are named there as well."""
    trail: list[str] = []
    here = body
    for position, part in enumerate(loc[1:], start=2):
        if isinstance(here, Mapping) and part in here:  # noqa: SIM114 - two conditions too long for one line
            here = here[part]
        elif isinstance(here, list) and isinstance(part, int) and part < len(here):
            here = here[part]
        elif position < len(loc) or not isinstance(here, Mapping):
            continue
        trail.append(str(part))
    return ".".join(trail)
