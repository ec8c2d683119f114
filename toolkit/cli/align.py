"""`toolkit align`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from toolkit.cli.common import Json, Overwrite, Quiet, TrustRemoteCode, show, without_none


def align(
    reference: Annotated[str, typer.Argument(help="Model that stays as it is.", show_default=False)],
    model: Annotated[str, typer.Argument(help="Model to align to it.", show_default=False)],
    out: Annotated[Path, typer.Argument(help="Folder to write.", show_default=False)],
    seed: Annotated[int, typer.Option(help="Of the order in which groups of units take turns.")] = 0,
    sweeps: Annotated[int | None, typer.Option(help="Most turns of all groups. Default: 50.")] = None,
    residual: Annotated[bool, typer.Option(help="Also permute the residual stream.")] = True,
    singular_vectors: Annotated[
        bool, typer.Option("--singular-vectors", help="Also report how well singular vectors agree (slow).")
    ] = False,
    data: Annotated[
        list[Path] | None, typer.Option(help="JSONL: measure the barrier on it, before and after; repeatable.")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Take the first rows of the data only.")] = None,
    points: Annotated[int, typer.Option(help="Of the line between the models, both ends included.")] = 11,
    by_layer: Annotated[bool, typer.Option("--by-layer", help="Also measure the barrier of each layer.")] = False,
    device: Annotated[str, typer.Option(help="To measure on.")] = "auto",
    trust_remote_code: TrustRemoteCode = False,
    allow_pickle: Annotated[
        bool, typer.Option("--allow-pickle", help="Also read pickled weights, weights only.")
    ] = False,
    overwrite: Overwrite = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Permute a model's units to match another's, so that models without a common base can be merged."""
    from toolkit.jobs.align import align as run

    result = run(
        reference,
        model,
        out,
        seed=seed,
        residual=residual,
        singular_vectors=singular_vectors,
        data=data or None,
        limit=limit,
        points=points,
        by_layer=by_layer,
        device=device,
        trust_remote_code=trust_remote_code,
        allow_pickle=allow_pickle,
        overwrite=overwrite,
        quiet=quiet,
        **without_none(sweeps=sweeps),
    )
    show(result, json)
