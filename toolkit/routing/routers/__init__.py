"""Routers, one per file; `toolkit.routing.router` says what a file declares."""
