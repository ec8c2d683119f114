"""`toolkit inspect`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from toolkit.cli.common import Json, Quiet, show
from toolkit.errors import SpecError


def inspect(
    paths: Annotated[
        list[str], typer.Argument(help="Models, adapters, compressed deltas or routers.", show_default=False)
    ],
    base: Annotated[
        str | None, typer.Option(help="Compare all with this model, and measure what they changed of it.")
    ] = None,
    deltas: Annotated[
        bool, typer.Option("--deltas", help="Measure what they changed of the first model: norms, cosines, conflicts.")
    ] = False,
    energy: Annotated[
        bool, typer.Option(help="Deltas: also measure what the top ranks hold; takes singular values.")
    ] = True,
    ranks: Annotated[str | None, typer.Option(help="Deltas: these top ranks. Default: 1,8,16.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Deltas: draw them into this .png, .svg or .pdf.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the plot if it exists.")] = False,
    allow_pickle: Annotated[
        bool, typer.Option("--allow-pickle", help="Also read pickled weights, weights only.")
    ] = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Say what models and adapters hold, whether they fit together, and how much their changes conflict."""
    from toolkit.jobs.inspect import inspect as run

    result = run(
        *paths,
        base=base,
        deltas=deltas,
        energy=energy,
        ranks=_numbers(ranks),
        plot=plot,
        overwrite=overwrite,
        allow_pickle=allow_pickle,
        quiet=quiet,
    )
    show(result, json)
    if not result.numbers.get("compatible", True):
        raise typer.Exit(1)


def _numbers(text: str | None) -> list[int] | None:
    if text is None:
        return None
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() for word in words):
        raise SpecError(f"--ranks {text!r}: expected numbers separated by commas, such as 1,8,16")
    return [int(word) for word in words]
