"""The web page at `/`: static files of this package."""

from __future__ import annotations

from importlib import resources

from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

TYPES = {
    "html": "text/html; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
}
"""Media types by the ending of a file's name; files of other kinds are not served."""

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; base-uri 'none';"
    " form-action 'none'; frame-ancestors 'none'"
)
"""Content security policy: the page loads nothing from elsewhere, and talks to nobody but its server."""

HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


class Page:
    """Answers for the page and its files, which need no key: what the page asks for carries one.

    Args:
        app: answers for all else.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app, self.responses = app, _responses()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        found = self.responses.get(scope.get("path", "")) if scope["type"] == "http" else None
        if found is None or scope["method"] not in ("GET", "HEAD"):
            await self.app(scope, receive, send)
        else:
            await found(scope, receive, send)


def _responses() -> dict[str, Response]:
    """Return the response at each path."""
    found: dict[str, Response] = {}
    for file in (resources.files("toolkit.serving") / "web").iterdir():
        kind = TYPES.get(file.name.rpartition(".")[2])
        if kind:
            path = "/" if file.name == "index.html" else f"/web/{file.name}"
            found[path] = Response(file.read_bytes(), headers=HEADERS, media_type=kind)
    return found
