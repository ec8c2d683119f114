"""`toolkit evaluate`."""

from __future__ import annotations

from toolkit.cli.common import Json, Out, Overwrite, Quiet, Set, Smoke, SpecFile, TrustRemoteCode, show, with_trust


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
    """Measure models, adapters, merges and routes on tasks: one table."""
    from toolkit.jobs.evaluate import evaluate as run

    overrides = with_trust(set_, trust_remote_code)
    show(run(spec, out, overrides=overrides, smoke=smoke, overwrite=overwrite, quiet=quiet), json)
