"""The command line: one file per command, each parses, calls one function and prints.

Importing this package imports typer alone; what a command needs is imported when it runs.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import typer

from toolkit.cli import (
    align,
    evaluate,
    extract,
    inspect,
    merge,
    moe,
    quickstart,
    recipe,
    route,
    search,
    serve,
    skills,
    train,
)
from toolkit.errors import SpecError, ToolkitError

FAILED, WRONG_SPEC = 1, 2
"""Exit codes: something failed; the command line or a spec is wrong. An interrupted command ends with 130."""

app = typer.Typer(
    name="toolkit",
    help="Compose language models that share a base: merge, train adapters, route, serve.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
app.command("quickstart")(quickstart.quickstart)
app.command("train")(train.train)
app.command("merge")(merge.merge)
app.command("search")(search.search)
app.command("extract")(extract.extract)
app.command("moe")(moe.moe)
app.command("align")(align.align)
app.add_typer(route.app, name="route")
app.command("serve")(serve.serve)
app.command("evaluate")(evaluate.evaluate)
app.command("inspect")(inspect.inspect)
app.command("run")(recipe.run)
app.command("skills")(skills.skills)


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(version("composition-toolkit"))
        raise typer.Exit


@app.callback()
def _options(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Print the version."),
) -> None:
    pass


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code. A user's mistake prints one error and no traceback."""
    try:
        app(list(arguments) if arguments is not None else None)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 0
    except SpecError as error:
        return _report(error, WRONG_SPEC)
    except ToolkitError as error:
        return _report(error, FAILED)
    return 0


def run() -> None:
    """Run the command line and end the process; the entry point of `toolkit`."""
    sys.exit(main())


def _report(error: ToolkitError, code: int) -> int:
    print(f"error: {error}", file=sys.stderr)
    return code
