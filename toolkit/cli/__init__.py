"""The command line: one file per command, each parses, calls one function and prints.

A command's file is imported when the command is called, or help is asked for; what it needs, when it runs.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterable, Sequence

import typer

from toolkit.errors import SpecError, ToolkitError
from toolkit.progress import interruptible

FAILED, WRONG_SPEC, INTERRUPTED = 1, 2, 130
"""Exit codes: something failed; the command line or a spec is wrong; Ctrl-C, as shells have it."""

COMMANDS = {
    "quickstart": "quickstart:quickstart",
    "train": "train:train",
    "adapters": "adapters:app",
    "merge": "merge:merge",
    "search": "search:search",
    "learn": "learn:learn",
    "extract": "extract:extract",
    "moe": "moe:moe",
    "align": "align:align",
    "route": "route:app",
    "serve": "serve:serve",
    "bench-serve": "bench_serve:bench_serve",
    "evaluate": "evaluate:evaluate",
    "inspect": "inspect:inspect",
    "run": "recipe:run",
    "skills": "skills:skills",
}
"""Commands -> module of this package, and its function or group of commands; help lists them in this order."""


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(version("composition-toolkit"))
        raise typer.Exit


def _options(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Print the version."),
) -> None:
    pass


def _app(names: Iterable[str]) -> typer.Typer:
    """Return the command line with some of its commands."""
    app = typer.Typer(
        name="toolkit",
        help="Compose language models that share a base: merge, train adapters, route, serve.",
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        rich_markup_mode="rich",
    )
    app.callback()(_options)
    for name in names:
        module, _, attribute = COMMANDS[name].partition(":")
        command = getattr(importlib.import_module(f"toolkit.cli.{module}"), attribute)
        app.add_typer(command, name=name) if isinstance(command, typer.Typer) else app.command(name)(command)
    return app


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code. A user's mistake prints one error and no traceback."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    named = given[0] if given and given[0] in COMMANDS else None
    try:
        with interruptible():
            _app([named] if named else COMMANDS)(given)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 0
    except SpecError as error:
        return _report(error, WRONG_SPEC)
    except ToolkitError as error:
        return _report(error, FAILED)
    return 0


def run() -> None:
    """Run the command line and end the process; the entry point of `toolkit`."""
    code = main()
    if code == INTERRUPTED:
        # What was open is closed. What libraries do when Python ends can wait for ever for a thread or a queue that
        # the interrupt broke, as the writer of TensorBoard's files does.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _report(error: ToolkitError, code: int) -> int:
    print(f"error: {error}", file=sys.stderr)
    return code
