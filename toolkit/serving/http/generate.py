"""`/v1/completions` and `/v1/chat/completions`."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any
from urllib.parse import quote

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from toolkit.serving.http.answers import Answers, Part
from toolkit.serving.http.bodies import ChatBody, CompletionBody, GenerateBody
from toolkit.serving.http.calls import Call
from toolkit.serving.http.errors import ApiError, error_body
from toolkit.serving.http.limits import Queue
from toolkit.serving.http.records import Record
from toolkit.serving.http.responses import BODY_ERRORS, ChatCompletion, Completion, ResponseBody, errors, streamed
from toolkit.serving.http.token_texts import TokenTexts
from toolkit.serving.http.writer import Writer
from toolkit.serving.loop import EngineLoop

CLIENT_CLOSED = 499
"""Status for a client that went away; nobody sees it but the log."""


def generate_routes(loop: EngineLoop, queue: Queue, texts: TokenTexts) -> APIRouter:
    """Return the routes."""
    routes = APIRouter(tags=["models"])

    async def answer(body: GenerateBody, request: Request) -> Response:
        record: Record = request.state.record
        record.model = body.asked_model
        call = Call(loop, queue, body, record)
        await call.submit()
        writer = Writer(isinstance(body, ChatBody), body.asked_model, record.id, len(body.prompts))
        answers = Answers(call, writer, texts)
        return _streamed(answers) if body.stream else await _whole(answers, request)

    @routes.post("/v1/completions", responses=_answers("/v1/completions", Completion))
    async def completions(body: CompletionBody, request: Request) -> Response:
        return await answer(body, request)

    @routes.post("/v1/chat/completions", responses=_answers("/v1/chat/completions", ChatCompletion))
    async def chat_completions(body: ChatBody, request: Request) -> Response:
        return await answer(body, request)

    return routes


def _answers(path: str, whole: type[ResponseBody]) -> dict[int | str, dict[str, Any]]:
    """Return the documentation of what a route answers."""
    forms = streamed(path)
    forms[200]["model"] = whole
    return forms | errors(404, 504, *BODY_ERRORS)


async def _whole(answers: Answers, request: Request) -> Response:
    whole = asyncio.ensure_future(_collect(answers))
    gone = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({whole, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not whole.done():
            return Response(status_code=CLIENT_CLOSED)
        # Percent-encoded, for a name may have characters that a header cannot.
        return JSONResponse(whole.result(), headers={"x-toolkit-model": quote(answers.writer.model, safe="")})
    finally:
        gone.cancel()
        whole.cancel()
        answers.call.cancel()  # leaves what is finished alone


async def _collect(answers: Answers) -> dict[str, Any]:
    async for _ in answers.parts():
        pass
    choices = [await answers.choice(index) for index in range(len(answers.call.tickets))]
    return answers.writer.whole(choices, answers.call.prompt_tokens, answers.call.record.tokens)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _streamed(answers: Answers) -> Response:
    return StreamingResponse(
        _events(answers),
        media_type="text/event-stream",
        headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"},
    )


async def _events(answers: Answers) -> AsyncIterator[str]:
    """Yield the server-sent events of a stream; when the client goes away the request is cancelled."""
    call, writer = answers.call, answers.writer
    try:
        async for part in answers.parts():
            if part.shows:
                yield _event(await _chunk(answers, part))
        if call.body.include_usage:
            yield _event(writer.usage_chunk(call.prompt_tokens, call.record.tokens))
        yield "data: [DONE]\n\n"
    except ApiError as error:
        yield _event(error_body(str(error), "server_error", error.code))
    finally:
        call.cancel()  # leaves what is finished alone


async def _chunk(answers: Answers, part: Part) -> dict[str, Any]:
    return answers.writer.chunk(
        part.index,
        answers.echo(part.index) + part.text if part.first else part.text,
        part.reason,
        part.calls,
        await answers.logprobs(part),
        first=part.first,
        called=part.called,
    )


def _event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n"
