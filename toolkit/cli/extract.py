"""`toolkit extract`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from toolkit.cli.common import Json, Overwrite, Quiet, named_paths, show, without_none
from toolkit.errors import SpecError


def extract(
    base: Annotated[str, typer.Argument(help="Model that the fine-tunes started from.", show_default=False)],
    tuned: Annotated[
        list[str], typer.Argument(help="Fine-tunes of it: paths, or all as name=path.", show_default=False)
    ],
    out: Annotated[Path, typer.Argument(help="Folder to write.", show_default=False)],
    as_: Annotated[
        str, typer.Option("--as", help="lora, svd (pairs of any matrix), mask (one vector, a mask each) or bit.")
    ] = "lora",
    rank: Annotated[str | None, typer.Option(help="lora, svd: of every pair, or full. Default: 16.")] = None,
    energy: Annotated[float | None, typer.Option(help="lora, svd: share of each change that is kept.")] = None,
    budget: Annotated[str | None, typer.Option(help="lora, svd: size of all that is written, such as 20MB.")] = None,
    lambda_: Annotated[
        list[float] | None, typer.Option("--lambda", help="mask: once, or once per fine-tune. Default: 1.")
    ] = None,
    scale: Annotated[str | None, typer.Option(help="bit: one per row or one per tensor. Default: row.")] = None,
    embeddings: Annotated[
        bool | None, typer.Option(help="Also compress embeddings and heads. Default: for svd and mask.")
    ] = None,
    keep: Annotated[
        list[str] | None, typer.Option(help="Keep the tensors that this filter matches whole; repeatable.")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="Of factors and vectors, such as bfloat16.")] = None,
    allow_pickle: Annotated[
        bool, typer.Option("--allow-pickle", help="Also read pickled weights, weights only.")
    ] = False,
    overwrite: Overwrite = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Turn fine-tunes into small changes of their base: a LoRA, masks over one vector, 1-bit deltas."""
    from toolkit.merge.extract import run_extract

    named = all("=" in path for path in tuned)
    if not named and any("=" in path and not Path(path).exists() for path in tuned):
        raise SpecError("name all fine-tunes as name=path, or none")
    options = without_none(
        rank=int(rank) if rank and rank.isdecimal() else rank,
        energy=energy,
        budget=budget,
        scale=scale,
        embeddings=embeddings,
        dtype=dtype,
    )
    options |= without_none(**{"lambda": lambda_ or None, "keep": keep or None})
    spec = {"base": base, "tuned": named_paths(tuned, "fine-tune") if named else tuned, "as": as_}
    show(run_extract(spec | options | {"allow_pickle": allow_pickle}, out, overwrite=overwrite, quiet=quiet), json)
