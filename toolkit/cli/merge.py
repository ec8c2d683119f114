"""`toolkit merge`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from toolkit.cli.common import Json, Overwrite, Quiet, Resume, Set, Smoke, SpecFile, show, show_tables
from toolkit.errors import SpecError


def merge(
    spec: SpecFile,
    out: Annotated[Path | None, typer.Argument(help="Folder to write; not needed with --dry-run.")] = None,
    set_: Set = [],  # noqa: B006 - typer reads the default, nobody changes it
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan; read and write no weights.")] = False,
    resume: Resume = False,
    overwrite: Overwrite = False,
    workers: Annotated[int | None, typer.Option(min=1, help="Threads; by default one per core, at most four.")] = None,
    shard_size: Annotated[str, typer.Option(help="Largest size of an output file, such as 5GB or 200MB.")] = "5GB",
    allow_pickle: Annotated[
        bool, typer.Option("--allow-pickle", help="Also read pickled weights, weights only.")
    ] = False,
    smoke: Smoke = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Merge models, or LoRAs of one base, as a spec says. Runs mergekit's YAML."""
    from toolkit.merge.plan import make_plan
    from toolkit.merge.run import merge as run

    size = _bytes(shard_size)
    if dry_run:
        plan = make_plan(spec, overrides=set_, smoke=smoke, allow_pickle=allow_pickle, shard_bytes=size)
        plan.inputs.close()
        if json:
            import json as json_

            print(json_.dumps(plan.to_dict(), indent=2))
        else:
            show_tables([plan.table()])
        return
    if out is None:
        raise SpecError("name the folder to write: toolkit merge SPEC OUT")
    result = run(
        spec,
        out,
        overrides=set_,
        smoke=smoke,
        resume=resume,
        overwrite=overwrite,
        workers=workers,
        shard_bytes=size,
        allow_pickle=allow_pickle,
        quiet=quiet,
    )
    show(result, json)


def _bytes(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)B?", text.strip(), re.IGNORECASE)
    size = int(float(match[1]) * 1000 ** " KMGT".index(match[2].upper() or " ")) if match else 0
    if size < 1:
        raise SpecError(f"--shard-size {text!r} is not a size such as 5GB")
    return size
