"""`toolkit run`."""

from __future__ import annotations

from toolkit.cli.common import Json, Out, Quiet, Set, Smoke, SpecFile, show


def run(
    recipe: SpecFile,
    out: Out = None,
    set_: Set = [],  # noqa: B006 - typer reads the default, nobody changes it
    smoke: Smoke = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Run a recipe: several jobs in one YAML, each step's output feeding the next."""
    from toolkit.jobs.recipe import run_recipe

    show(run_recipe(recipe, out, overrides=set_, smoke=smoke, quiet=quiet), json)
