"""`toolkit search`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from toolkit.cli.common import (
    Json,
    Overwrite,
    Quiet,
    Resume,
    Set,
    Smoke,
    TrustRemoteCode,
    is_spec,
    named_paths,
    show,
    with_trust,
    without_none,
)
from toolkit.errors import SpecError


def search(
    places: Annotated[
        list[str], typer.Argument(metavar="[SPEC] [OUT]", help="YAML file of the spec; folder to write.")
    ],
    base: Annotated[str | None, typer.Option(help="Instead of a spec: the base of the models.")] = None,
    model: Annotated[
        list[str], typer.Option("--model", "--adapter", metavar="NAME=PATH", help="A LoRA or fine-tune of the base.")
    ] = [],  # noqa: B006 - typer reads the default, nobody changes it
    data: Annotated[
        list[str], typer.Option(metavar="TASK=FILE", help="Rows to tune on; may be given several times.")
    ] = [],  # noqa: B006 - likewise
    test: Annotated[list[str], typer.Option(metavar="TASK=FILE", help="Other rows, for the table.")] = [],  # noqa: B006 - likewise
    holdout: Annotated[
        float | None, typer.Option(help="Instead of --test: share of the rows that is kept for the table.")
    ] = None,
    metric: Annotated[str | None, typer.Option(help="exact_match (the default) or perplexity.")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Most tokens of an answer.")] = None,
    limit: Annotated[int | None, typer.Option(help="Most rows of a task.")] = None,
    method: Annotated[str | None, typer.Option(help="cma (the default), grid or random.")] = None,
    budget: Annotated[int | None, typer.Option(help="Most candidates that are measured.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of the search.")] = None,
    set_: Set = [],  # noqa: B006 - likewise
    resume: Resume = False,
    overwrite: Overwrite = False,
    trust_remote_code: TrustRemoteCode = False,
    smoke: Smoke = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Tune the coefficients of a merge on tasks: SPEC OUT, or --base, --adapter and --data with OUT."""
    from toolkit.jobs.search.run import search as run

    task = without_none(metric=metric, max_tokens=max_tokens, limit=limit)
    plain = without_none(base=base, holdout=holdout)
    plain |= {"models": named_paths(model, "--adapter")} if model else {}
    for key, pairs in (("tasks", data), ("test", test)):
        named = named_paths(pairs, "--data" if key == "tasks" else "--test")
        plain |= {key: {name: {"data": file} | task for name, file in named.items()}} if named else {}
    spec, out = _places(places, plain, bool(task))
    options = without_none(method=method, budget=budget, seed=seed)
    overrides = [*(f"search.{key}={value}" for key, value in options.items()), *set_]
    overrides = with_trust(overrides, trust_remote_code)
    show(run(spec, out, overrides=overrides, smoke=smoke, resume=resume, overwrite=overwrite, quiet=quiet), json)


def _places(places: list[str], plain: dict[str, Any], task: bool) -> tuple[Any, Path | None]:
    """Tell the spec from the folder to write; without a spec, the options are one."""
    from_file = is_spec(places[0])
    if len(places) > 1 + from_file:
        raise SpecError(f"expected {'SPEC OUT' if from_file else 'OUT'}, got {' '.join(places)}")
    if not from_file:
        return plain, Path(places[0])
    if plain or task:
        raise SpecError("--base, --adapter, --data and their like stand for a spec; change one with --set KEY=VALUE")
    return places[0], Path(places[1]) if len(places) > 1 else None
