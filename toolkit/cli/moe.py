"""`toolkit moe`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from toolkit.cli.common import Json, Overwrite, Quiet, Set, Smoke, SpecFile, show, show_tables, size
from toolkit.errors import SpecError


def moe(
    spec: SpecFile,
    out: Annotated[Path | None, typer.Argument(help="Folder to write; not needed with --dry-run.")] = None,
    set_: Set = [],  # noqa: B006 - typer reads the default, nobody changes it
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check and print the plan; read no weights.")] = False,
    overwrite: Overwrite = False,
    device: Annotated[str, typer.Option(help="Where the base reads the prompts.")] = "auto",
    shard_size: Annotated[str, typer.Option(help="Largest size of an output file, such as 5GB or 200MB.")] = "5GB",
    allow_pickle: Annotated[
        bool, typer.Option("--allow-pickle", help="Also read pickled weights, weights only.")
    ] = False,
    smoke: Smoke = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Make a mixture of experts out of dense models, routed by prompts. Runs mergekit-moe's YAML."""
    from toolkit.merge.moe.build import build_moe
    from toolkit.merge.moe.plan import make_plan

    shard_bytes = size(shard_size, "--shard-size")
    if dry_run:
        plan = make_plan(spec, overrides=set_, smoke=smoke, allow_pickle=allow_pickle, shard_bytes=shard_bytes)
        plan.models.close()
        if json:
            import json as json_

            print(json_.dumps(plan.numbers(), indent=2))
        else:
            show_tables([plan.table()])
        return
    if out is None:
        raise SpecError("name the folder to write: toolkit moe SPEC OUT")
    result = build_moe(
        spec,
        out,
        overrides=set_,
        smoke=smoke,
        overwrite=overwrite,
        device=device,
        shard_bytes=shard_bytes,
        allow_pickle=allow_pickle,
        quiet=quiet,
    )
    show(result, json)
