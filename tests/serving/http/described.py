"""Holds what a server answers against what its OpenAPI document says of it."""

from __future__ import annotations

import json
import re
from typing import Any

import httpx
import jsonschema


class Document:
    """An OpenAPI document.

    Args:
        document: as JSON.
    """

    def __init__(self, document: dict[str, Any]) -> None:
        self.document = document
        self.paths = {path: re.compile(re.sub(r"\{\w+\}", "[^/]+", path)) for path in document["paths"]}
        self.seen: set[tuple[str, str, int, str]] = set()

    def operation(self, request: httpx.Request) -> tuple[str, dict[str, Any]] | None:
        """The path and the operation that a request is for; `None` for what is not there."""
        for path in sorted(self.paths, key=lambda path: path.count("{")):
            found = self.document["paths"][path].get(request.method.lower())
            if found and self.paths[path].fullmatch(request.url.path):
                return path, found
        return None

    def validate(self, value: Any, schema: dict[str, Any]) -> None:
        """Check a value against a schema of the document."""
        jsonschema.Draft202012Validator({**schema, "components": self.document["components"]}).validate(value)

    def check(self, response: httpx.Response) -> None:
        """Check status, headers, type and body of a response that is read to its end."""
        place = self.operation(response.request)
        if place is None:
            assert response.status_code in (404, 405), response.request.url.path
            self.validate(response.json(), {"$ref": "#/components/schemas/ErrorResponse"})
            return
        path, operation = place
        status = str(response.status_code)
        assert status in operation["responses"], f"{response.request.method} {path}: {status} is not described"
        described = operation["responses"][status]
        kind = response.headers["content-type"].partition(";")[0]
        kinds = {name.partition(";")[0]: form for name, form in described["content"].items()}
        assert kind in kinds, f"{response.request.method} {path}: {status} as {kind} is not described"
        if response.status_code != 200:
            assert all(name in response.headers for name in described["headers"])
        self.seen.add((response.request.method, path, response.status_code, kind))
        if kind == "application/json":
            self.validate(response.json(), kinds[kind]["schema"])
        elif kind == "text/event-stream":
            self._check_events(response.text, kinds[kind]["schema"]["x-event-schema"])

    def _check_events(self, text: str, schema: dict[str, Any]) -> None:
        events = [event.removeprefix("data: ") for event in text.split("\n\n") if event]
        failed = '"error"' in events[-1]
        assert failed or events[-1] == "[DONE]"
        for event in events[:-1]:
            self.validate(json.loads(event), schema)
        if failed:
            self.validate(json.loads(events[-1]), {"$ref": "#/components/schemas/ErrorResponse"})

    def client(self, url: str, **options: Any) -> httpx.Client:
        """A client that checks every response."""

        def check(response: httpx.Response) -> None:
            response.read()
            self.check(response)

        return httpx.Client(base_url=url, trust_env=False, timeout=60, event_hooks={"response": [check]}, **options)
