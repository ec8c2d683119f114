"""`toolkit route`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from toolkit.cli.common import (
    Json,
    Out,
    Overwrite,
    Quiet,
    Set,
    Smoke,
    SpecFile,
    TrustRemoteCode,
    show,
    show_tables,
    with_trust,
)

app = typer.Typer(help="Choose the adapter or model for each prompt.", no_args_is_help=True)


@app.command()
def fit(
    spec: SpecFile,
    out: Out = None,
    set_: Set = [],  # noqa: B006 - typer reads the default, nobody changes it
    overwrite: Overwrite = False,
    trust_remote_code: TrustRemoteCode = False,
    smoke: Smoke = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Fit a router, from prompts made for each expert or from measured answers."""
    from toolkit.routing.fit import fit_router

    overrides = with_trust(set_, trust_remote_code, "embedding.trust_remote_code")
    router = fit_router(spec, out, overrides=overrides, smoke=smoke, overwrite=overwrite, quiet=quiet)
    if json:
        import json as json_

        print(json_.dumps(router.to_dict(), indent=2))
    else:
        show_tables([router.table()])


@app.command()
def gates(
    spec: SpecFile,
    out: Out = None,
    set_: Set = [],  # noqa: B006 - as above
    overwrite: Overwrite = False,
    trust_remote_code: TrustRemoteCode = False,
    smoke: Smoke = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Train the gates of a token router over frozen adapters."""
    from toolkit.routing.token.fit import fit_gates

    overrides = with_trust(set_, trust_remote_code)
    show(fit_gates(spec, out, overrides=overrides, smoke=smoke, overwrite=overwrite, quiet=quiet), json)


@app.command()
def evaluate(
    spec: SpecFile,
    out: Out = None,
    set_: Set = [],  # noqa: B006 - typer reads the default, nobody changes it
    overwrite: Overwrite = False,
    trust_remote_code: TrustRemoteCode = False,
    smoke: Smoke = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Judge a router: accuracy, confusion, and the quality it reaches beside other ways to choose."""
    from toolkit.jobs.route import evaluate_router

    overrides = with_trust(set_, trust_remote_code)
    show(evaluate_router(spec, out, overrides=overrides, smoke=smoke, overwrite=overwrite, quiet=quiet), json)


@app.command()
def explain(
    router: Annotated[Path, typer.Argument(help="Folder of a fitted router.", show_default=False)],
    prompt: Annotated[str, typer.Argument(help="What a user would ask.", show_default=False)],
    trust_remote_code: TrustRemoteCode = False,
    json: Json = False,
) -> None:
    """Show the score of every expert for one prompt."""
    from toolkit.jobs.route import explain_route

    show(explain_route(router, prompt, trust_remote_code=trust_remote_code), json)


@app.command()
def calibrate(
    spec: SpecFile,
    out: Out = None,
    set_: Set = [],  # noqa: B006 - as above
    overwrite: Overwrite = False,
    trust_remote_code: TrustRemoteCode = False,
    smoke: Smoke = False,
    json: Json = False,
) -> None:
    """Set how a router decides, so that a wanted share or cost of the requests goes to the strong expert."""
    from toolkit.routing.calibrate import calibrate_router

    overrides = with_trust(set_, trust_remote_code)
    show(calibrate_router(spec, out, overrides=overrides, smoke=smoke, overwrite=overwrite), json)


@app.command()
def compare(
    spec: SpecFile,
    out: Out = None,
    set_: Set = [],  # noqa: B006 - as above
    overwrite: Overwrite = False,
    smoke: Smoke = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Fit several routers on parts of measured answers and judge them on the rest."""
    from toolkit.routing.compare import compare_routers

    show(compare_routers(spec, out, overrides=set_, smoke=smoke, overwrite=overwrite, quiet=quiet), json)


@app.command()
def fuse(
    spec: SpecFile,
    out: Out = None,
    prompt: Annotated[
        list[str], typer.Option(help="What is asked, instead of the spec's prompts; may be given several times.")
    ] = [],  # noqa: B006 - as above
    set_: Set = [],  # noqa: B006 - as above
    overwrite: Overwrite = False,
    trust_remote_code: TrustRemoteCode = False,
    smoke: Smoke = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Answer prompts with a large model that small experts steer at every step."""
    from toolkit.routing.fusion.run import fuse_logits

    overrides = with_trust(set_, trust_remote_code)
    options = {"smoke": smoke, "overwrite": overwrite, "quiet": quiet}
    show(fuse_logits(spec, out, prompts=prompt, overrides=overrides, **options), json)
