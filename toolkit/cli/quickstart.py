"""`toolkit quickstart`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from toolkit.cli.common import Json, Quiet, Smoke


def quickstart(
    out: Annotated[Path, typer.Argument(help="Folder to work in.")] = Path("quickstart"),
    smoke: Smoke = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """The whole story on the embedded base: train adapters, merge them, fit a router, serve and score it all."""
    from toolkit.cli.common import show
    from toolkit.jobs.quickstart import NEXT
    from toolkit.jobs.quickstart import quickstart as run

    result = run(out, smoke=smoke, quiet=quiet)
    show(result, json)
    if not json:
        print(NEXT.format(out=shlex.quote(str(out))))
