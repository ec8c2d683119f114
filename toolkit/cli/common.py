"""What commands share: options, and printing of results."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from toolkit.errors import SpecError

if TYPE_CHECKING:
    from rich.text import Text

    from toolkit.tables import Report, Table

SpecFile = Annotated[Path, typer.Argument(help="YAML file of the spec.", show_default=False)]
Out = Annotated[Path | None, typer.Argument(help="Folder to write; by default the spec's own.", show_default=False)]
Set = Annotated[
    list[str],
    typer.Option("--set", help="Change the spec: key.path=value; may be given several times.", metavar="KEY=VALUE"),
]
Smoke = Annotated[bool, typer.Option("--smoke", help="Apply the spec's own smoke block: a small, quick run.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the output if it exists.")]
TrustRemoteCode = Annotated[bool, typer.Option("--trust-remote-code", help="Run code that comes with the model.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with a run that was stopped.")]


def show(result: Report, as_json: bool) -> None:
    """Print a result: its tables, or its numbers as JSON."""
    if as_json:
        print(json.dumps(result.to_dict(), indent=2))
    else:
        show_tables(result.tables)


def show_tables(tables: Sequence[Table]) -> None:
    """Print tables; as wide as they need to be where the output is no terminal."""
    if not sys.stdout.isatty():
        print("\n\n".join(table.to_text() for table in tables))
        return
    from rich.console import Console

    console = Console()
    for table in tables:
        console.print(table)


def show_texts(texts: Sequence[Text]) -> None:
    """Print coloured texts, a blank line after each; nothing is broken into lines where the output is no terminal."""
    from rich.console import Console

    console = Console(highlight=False, soft_wrap=not sys.stdout.isatty())
    for text in texts:
        console.print(text, end="\n\n")


def named_paths(pairs: Sequence[str], option: str) -> dict[str, str]:
    """Read `name=path` pairs of an option."""
    found: dict[str, str] = {}
    for pair in pairs:
        name, sep, path = pair.partition("=")
        if not sep or not name or not path:
            raise SpecError(f"{option} {pair!r} is not of the form name=path")
        if name in found:
            raise SpecError(f"{option}: the name {name!r} is given twice")
        found[name] = path
    return found


def is_spec(text: str) -> bool:
    """Tell whether an argument names a YAML file rather than a model."""
    return text.endswith((".yaml", ".yml"))


def with_trust(overrides: Sequence[str], trusted: bool, key: str = "trust_remote_code") -> list[str]:
    """Return the overrides of a spec, and that a model's own code may run."""
    return [*overrides, *([f"{key}=true"] if trusted else [])]


def size(text: str, option: str) -> int:
    """Read the bytes that an option names, such as 5GB."""
    from toolkit.specs import parse_bytes

    try:
        return parse_bytes(text)
    except ValueError as error:
        raise SpecError(f"{option} {text!r}: {error}") from None


def without_none(**values: Any) -> dict[str, Any]:
    """Return the options that were given."""
    return {name: value for name, value in values.items() if value is not None}
