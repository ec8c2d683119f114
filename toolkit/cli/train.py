"""`toolkit train`."""

from __future__ import annotations

import json as json_
import sys
from pathlib import Path
from typing import Annotated

import typer

from toolkit.cli.common import (
    Json,
    Out,
    Overwrite,
    Quiet,
    Resume,
    Set,
    Smoke,
    SpecFile,
    TrustRemoteCode,
    show,
    show_tables,
    show_texts,
    with_trust,
)
from toolkit.errors import SpecError


def train(
    spec: SpecFile,
    out: Out = None,
    set_: Set = [],  # noqa: B006 - typer reads the default, nobody changes it
    resume: Resume = False,
    overwrite: Overwrite = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Tell tokens, steps, trained parameters and memory, and stop.")
    ] = False,
    show_rows: Annotated[
        int, typer.Option("--show", help="Show so many rows of each source, trained tokens coloured, and stop.", min=0)
    ] = 0,
    with_: Annotated[
        list[Path],
        typer.Option("--with", help="Another spec, whose LoRA trains in the same batches; may be given several times."),
    ] = [],  # noqa: B006
    trust_remote_code: TrustRemoteCode = False,
    smoke: Smoke = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Train an adapter, or a whole model, as a spec says."""
    overrides = with_trust(set_, trust_remote_code)
    if with_:
        if out or resume or dry_run or show_rows:
            raise SpecError("--with trains to the end, each spec into its own out; leave the other options out")
        _together([spec, *with_], overrides, smoke=smoke, overwrite=overwrite, json=json, quiet=quiet)
        return
    if show_rows:
        from toolkit.adapters.plan import preview

        shown = preview(spec, show_rows, overrides=overrides, smoke=smoke)
        print(json_.dumps(shown.to_dict(), indent=2)) if json else show_texts(
            shown.texts(marks=not sys.stdout.isatty())
        )
        return
    if dry_run:
        from toolkit.adapters.plan import plan_training

        show(plan_training(spec, overrides=overrides, smoke=smoke), json)
        return
    from toolkit.adapters.processes import is_first
    from toolkit.adapters.train import train as run

    result = run(spec, out, overrides=overrides, smoke=smoke, resume=resume, overwrite=overwrite, quiet=quiet)
    if is_first():
        show(result, json)


def _together(
    paths: list[Path], overrides: list[str], *, smoke: bool, overwrite: bool, json: bool, quiet: bool
) -> None:
    from toolkit.adapters.together import train_together

    results = train_together(paths, overrides=overrides, smoke=smoke, overwrite=overwrite, quiet=quiet)
    if json:
        print(json_.dumps([result.to_dict() for result in results], indent=2))
    else:
        show_tables([table for result in results for table in result.tables])
