"""What a server says of itself: its models, its health, its metrics."""

from __future__ import annotations

import time
from typing import Any

from fastapi import APIRouter
from fastapi.responses import PlainTextResponse, Response

from toolkit.serving.engine import Engine
from toolkit.serving.http.errors import ApiError
from toolkit.serving.http.limits import Queue
from toolkit.serving.http.metrics import Metrics
from toolkit.serving.http.responses import Health, ModelEntry, ModelList, Ready, errors
from toolkit.serving.http.writer import model_entry, model_list
from toolkit.serving.loop import EngineLoop


class MetricsResponse(PlainTextResponse):
    """Prometheus' text format."""

    media_type = "text/plain; version=0.0.4; charset=utf-8"


def model_routes(engine: Engine) -> APIRouter:
    """Return the routes of the list of models."""
    routes = APIRouter(tags=["models"])
    started = int(time.time())

    @routes.get("/v1/models", responses={200: {"model": ModelList}, **errors(401)})
    async def models() -> Any:
        return model_list(engine.models, started)

    @routes.get("/v1/models/{name}", responses={200: {"model": ModelEntry}, **errors(401, 404)})
    async def model(name: str) -> Any:
        if name not in engine.models:
            raise ApiError(404, f"no model {name!r} (served: {', '.join(engine.models)})", "model_not_found")
        return model_entry(name, started)

    return routes


def state_routes(loop: EngineLoop, queue: Queue, metrics: Metrics) -> APIRouter:
    """Return the routes that tell how the server is."""
    routes = APIRouter(tags=["state"])

    @routes.get("/health", responses={200: {"model": Health}, **errors(503)})
    async def health() -> Any:
        if not loop.alive:
            raise ApiError(503, "the engine has stopped", "engine_stopped")
        return {"status": "ok"}

    @routes.get("/ready", responses={200: {"model": Ready}, **errors(503)})
    async def ready() -> Any:
        if not loop.alive or queue.is_full(loop.engine):
            raise ApiError(503, "the engine has stopped" if not loop.alive else "the queue is full", "not_ready")
        return {"status": "ready"}

    @routes.get("/metrics", response_class=MetricsResponse, responses=errors(401))
    async def show_metrics() -> Response:
        return MetricsResponse(metrics.text())

    return routes
