"""`toolkit skills`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from toolkit.cli.common import Json, Overwrite, show


def skills(
    out: Annotated[Path, typer.Argument(help="Folder to write.", show_default=False)],
    train: Annotated[int, typer.Option(min=1, help="Training rows of each skill.")] = 2000,
    test: Annotated[int, typer.Option(min=1, help="Test rows of each skill.")] = 200,
    seed: Annotated[int, typer.Option(help="Of the rows.")] = 0,
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """Write the data of the skills that the embedded base can be taught."""
    from toolkit.jobs.skills import write_skills

    show(write_skills({"train": train, "test": test, "seed": seed}, out, overwrite=overwrite), json)
