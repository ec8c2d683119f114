"""`toolkit train`."""

from __future__ import annotations

import json as json_
import sys
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
    show_texts,
    with_trust,
)


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
    trust_remote_code: TrustRemoteCode = False,
    smoke: Smoke = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Train an adapter, or a whole model, as a spec says."""
    overrides = with_trust(set_, trust_remote_code)
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
    from toolkit.adapters.train import train as run

    show(run(spec, out, overrides=overrides, smoke=smoke, resume=resume, overwrite=overwrite, quiet=quiet), json)
