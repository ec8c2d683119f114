"""`toolkit adapters`."""

from __future__ import annotations

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
    with_trust,
)

app = typer.Typer(help="Turn adapters into others: another type, another rank, another base.", no_args_is_help=True)

Source = Annotated[str, typer.Argument(metavar="ADAPTER", help="Folder or hub id of an adapter.", show_default=False)]
Written = Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write.", show_default=False)]
Base = Annotated[str | None, typer.Option(help="Model that it is for; by default the one that it names.")]
Rank = Annotated[int | None, typer.Option(help="Rank of every pair.")]
Energy = Annotated[float | None, typer.Option(help="Instead, share of each change's squared norm that is kept.")]


@app.command()
def convert(
    adapter: Source,
    out: Written,
    rank: Rank = None,
    energy: Energy = None,
    base: Base = None,
    overwrite: Overwrite = False,
    trust_remote_code: TrustRemoteCode = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write any adapter that changes weights as LoRA: the best pairs of a rank."""
    from toolkit.adapters.convert import convert_adapter

    options = {"rank": rank, "energy": energy, "base": base, "overwrite": overwrite, "quiet": quiet}
    show(convert_adapter(adapter, out, trust_remote_code=trust_remote_code, **options), json)  # pyright: ignore[reportArgumentType]


@app.command()
def fold(
    adapter: Source,
    out: Written,
    task: Annotated[str | None, typer.Option(help="Of POLY: the number of a task, or unknown.")] = None,
    base: Base = None,
    overwrite: Overwrite = False,
    trust_remote_code: TrustRemoteCode = False,
    json: Json = False,
) -> None:
    """Write an adapter as the LoRA that it is exactly, for whatever serves LoRA."""
    from toolkit.adapters.convert import fold_adapter

    result = fold_adapter(adapter, out, base=base, task=task, overwrite=overwrite, trust_remote_code=trust_remote_code)
    show(result, json)


@app.command()
def resize(
    adapter: Source,
    out: Written,
    rank: Rank = None,
    energy: Energy = None,
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """Write a LoRA with other ranks."""
    from toolkit.adapters.ranks import resize as run

    show(run(adapter, out, rank=rank, energy=energy, overwrite=overwrite), json)


@app.command()
def prune(
    adapter: Source,
    out: Written,
    share: Annotated[float, typer.Option(help="Of all ranks to remove, the least first.")] = 0.5,
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """Write a LoRA without the ranks that matter least, over all modules together."""
    from toolkit.adapters.ranks import prune as run

    show(run(adapter, out, share=share, overwrite=overwrite), json)


@app.command()
def transfer(
    spec: SpecFile,
    out: Out = None,
    set_: Set = [],  # noqa: B006 - typer reads the default, nobody changes it
    resume: Resume = False,
    overwrite: Overwrite = False,
    trust_remote_code: TrustRemoteCode = False,
    smoke: Smoke = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Move an adapter to another base, with made-up data."""
    from toolkit.adapters.transfer.trans_lora import transfer as run

    overrides = with_trust(set_, trust_remote_code)
    show(run(spec, out, overrides=overrides, smoke=smoke, resume=resume, overwrite=overwrite, quiet=quiet), json)
