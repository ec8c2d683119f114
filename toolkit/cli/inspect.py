"""`toolkit inspect`."""

from __future__ import annotations

from typing import Annotated

import typer

from toolkit.cli.common import Json, show


def inspect(
    paths: Annotated[list[str], typer.Argument(help="Models, adapters or routers.", show_default=False)],
    allow_pickle: Annotated[
        bool, typer.Option("--allow-pickle", help="Also read pickled weights, weights only.")
    ] = False,
    json: Json = False,
) -> None:
    """Say what a model, an adapter or a router holds, and whether several fit together."""
    from toolkit.jobs.inspect import inspect as run

    result = run(*paths, allow_pickle=allow_pickle)
    show(result, json)
    if not result.numbers.get("compatible", True):
        raise typer.Exit(1)
