"""`/v1/embeddings`."""

from __future__ import annotations

import asyncio
import base64
from typing import Annotated, Any, Literal

import numpy as np
from fastapi import APIRouter, Request

from toolkit.errors import RequestError
from toolkit.serving.embed import Pooling, embed
from toolkit.serving.engine import Engine
from toolkit.serving.http.errors import of_request
from toolkit.serving.http.fields import Body, Prompts, only
from toolkit.serving.http.limits import Queue, QueueFullError
from toolkit.serving.http.records import Record
from toolkit.serving.http.responses import BODY_ERRORS, Embeddings, errors
from toolkit.serving.loop import EngineLoop
from toolkit.serving.prompts import Prompt


class EmbeddingBody(Body):
    """Body of `/v1/embeddings`."""

    model: str
    input: Prompts
    encoding_format: Literal["float", "base64"] = "float"
    pooling: Pooling = "last"
    normalize: bool = True
    user: str | None = None
    dimensions: Annotated[Any, only()] = None


def embedding_routes(loop: EngineLoop, queue: Queue) -> APIRouter:
    """Return the route."""
    routes = APIRouter(tags=["models"])

    @routes.post("/v1/embeddings", responses={200: {"model": Embeddings}, **errors(404, *BODY_ERRORS)})
    async def embeddings(body: EmbeddingBody, request: Request) -> Any:
        record: Record = request.state.record
        record.model = body.model
        vectors: list[list[float]] = []
        tokens = 0
        for prompt in body.input:
            vector, count = await _embed(loop, queue, body, prompt)
            vectors.append(vector)
            tokens += count
        record.prompt_tokens = tokens
        data = [
            {"object": "embedding", "index": index, "embedding": _encoded(vector, body.encoding_format)}
            for index, vector in enumerate(vectors)
        ]
        return {
            "object": "list",
            "data": data,
            "model": body.model,
            "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
        }

    return routes


async def _embed(loop: EngineLoop, queue: Queue, body: EmbeddingBody, prompt: Prompt) -> tuple[list[float], int]:
    """Embed one prompt, which keeps the engine from its steps no longer than that."""

    def run(engine: Engine) -> tuple[list[float], int]:
        return embed(engine, prompt, body.model, pooling=body.pooling, normalize=body.normalize)

    try:
        with queue.place(loop.engine):
            return await asyncio.wrap_future(loop.call(run))
    except RequestError as error:
        raise of_request(error) from None
    except QueueFullError as error:
        raise queue.refusal(error) from None


def _encoded(vector: list[float], form: str) -> list[float] | str:
    return vector if form == "float" else base64.b64encode(np.asarray(vector, "<f4").tobytes()).decode()
