"""Errors as OpenAI's clients expect them, each with its status and one line on what is wrong."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.routing import Match

from toolkit.errors import RequestError

ID_HEADER = "x-request-id"


class ApiError(Exception):
    """An error with its HTTP status.

    Args:
        status: of the response.
        message: what is wrong.
        code: OpenAI's or our name for it.
        headers: of the response.
    """

    def __init__(
        self, status: int, message: str, code: str | None = None, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.headers = status, code, dict(headers or {})

    @property
    def body(self) -> dict[str, Any]:
        """The body of the response."""
        return error_body(str(self), kind_of(self.status), self.code)

    def response(self) -> JSONResponse:
        """Return the response."""
        return JSONResponse(self.body, self.status, headers=self.headers)


def of_request(error: RequestError) -> ApiError:
    """Return the HTTP form of the engine's refusal of a request."""
    return ApiError(404 if error.code in ("job_not_found", "model_not_found") else 400, str(error), error.code)


def kind_of(status: int) -> str:
    """Return OpenAI's `type` of an error."""
    known = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
    return known.get(status, "invalid_request_error" if status < 500 else "server_error")


def error_body(message: str, kind: str, code: str | None = None, param: str | None = None) -> dict[str, Any]:
    """Return the body of an error; what is not Unicode in it is escaped."""
    message, param = _unicode(message), _unicode(param) if param else None
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def _unicode(text: str) -> str:
    """Escape lone surrogates, which JSON can carry in but which cannot be written out."""
    return text.encode(errors="backslashreplace").decode()


def add_error_handlers(app: FastAPI) -> None:
    """Make every error of an application one of these."""

    @app.exception_handler(ApiError)
    async def api_error(request: Request, error: ApiError) -> Response:
        return error.response()

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        message, param = explain(error)
        return JSONResponse(error_body(message, "invalid_request_error", None, param), 400)

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        status, headers = error.status_code, dict(error.headers or {})
        if status == 405:
            headers["Allow"] = ", ".join(_methods(request))
        return JSONResponse(error_body(str(error.detail), kind_of(status)), status, headers=headers)

    @app.exception_handler(Exception)
    async def unexpected(request: Request, error: Exception) -> Response:
        # The traceback goes to the log by itself: the framework raises the error again after this answer.
        answer = error_body("the server failed; see its log", "server_error", "internal_error")
        # This answer is made outside of the middleware that gives the others their id.
        return JSONResponse(answer, 500, headers={ID_HEADER: request.state.record.id})


def _methods(request: Request) -> list[str]:
    """Return what a path can be asked by; the framework names the methods of its first route alone."""
    routes, scope = request.app.routes, request.scope
    known = ("DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT")
    return [m for m in known if any(r.matches({**scope, "method": m})[0] is Match.FULL for r in routes)]


def explain(error: RequestValidationError) -> tuple[str, str | None]:
    """Return what is wrong with a body, and the field that it is about."""
    found = error.errors()
    first = found[0]
    if first["type"] == "json_invalid":
        return f"the body is not valid JSON ({first.get('ctx', {}).get('error', '')})", None
    trail = _trail(first["loc"], error.body)
    if not trail:
        if isinstance(error.body, bytes):
            return "send the body as JSON, with the header Content-Type: application/json", None
        if not isinstance(error.body, Mapping):
            return "the body must be a JSON object", None
        if first["type"] == "string_unicode":  # pydantic takes no other keys
            return "a key of the body is not valid Unicode", None
        return str(first["msg"]), None  # several fields that do not go together
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
