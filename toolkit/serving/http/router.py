"""What the router of the model `auto` is, what it decided, and how far its scores have drifted."""

from __future__ import annotations

from collections import Counter
from typing import Any

from fastapi import APIRouter

from toolkit.serving.engine import Engine
from toolkit.serving.http.errors import ApiError
from toolkit.serving.http.responses import RouterEntry, errors


def router_routes(engine: Engine) -> APIRouter:
    """Return the route."""
    routes = APIRouter(tags=["models"])

    @routes.get("/v1/router", responses={200: {"model": RouterEntry}, **errors(401, 404)})
    async def router() -> Any:
        routing = engine.routing
        if routing.router is None:
            raise ApiError(404, "this server has no router", "model_not_found")
        by_expert: Counter[str] = Counter()
        by_reason: Counter[str] = Counter()
        for (expert, reason), count in routing.decisions.copy().items():
            by_expert[expert] += count
            by_reason[reason] += count
        return {
            "object": "router",
            "kind": routing.router.kind,
            "experts": list(routing.router.experts),
            "fallback": routing.router.policy.fallback,
            "version": routing.version,
            "since": int(routing.since),
            "decisions": by_expert,
            "reasons": by_reason,
            "drift": routing.meter.index(),
            "refused": routing.refusal or None,
        }

    return routes
