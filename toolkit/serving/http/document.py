"""The OpenAPI document: what the framework derives from the routes, and what it cannot know."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic.json_schema import models_json_schema

from toolkit.serving.http.errors import ID_HEADER
from toolkit.serving.http.middleware import OPEN
from toolkit.serving.http.responses import NAMED

REFERENCE = "#/components/schemas/{model}"
_ID = {"schema": {"type": "string"}, "description": "The request's own `x-request-id`, or a new one."}


def describe(app: FastAPI, *, keyed: bool) -> None:
    """Let an application answer for its OpenAPI document.

    Args:
        app: with all its routes.
        keyed: requests must carry an API key.
    """

    def document() -> dict[str, Any]:
        if not app.openapi_schema:
            app.openapi_schema = _complete(get_openapi(title=app.title, version=app.version, routes=app.routes), keyed)
        return app.openapi_schema

    app.openapi = document


def _complete(found: dict[str, Any], keyed: bool) -> dict[str, Any]:
    schemas = found["components"]["schemas"]
    for name in ("HTTPValidationError", "ValidationError"):  # ours is 400, and has another form
        schemas.pop(name, None)
    schemas |= models_json_schema([(model, "serialization") for model in NAMED], ref_template=REFERENCE)[1]["$defs"]
    for path, item in found["paths"].items():
        for operation in item.values():
            operation["responses"].pop("422", None)
            for response in operation["responses"].values():
                response["headers"] = response.get("headers", {}) | {ID_HEADER: _ID}
            if keyed and path not in OPEN:
                operation["security"] = [{"key": []}]
            else:
                operation["responses"].pop("401", None)
    if keyed:
        found["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    return found
