"""`toolkit train`."""

from __future__ import annotations

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


def train(
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
    """Train an adapter, or a whole model, as a spec says."""
    from toolkit.adapters.train import train as run

    overrides = with_trust(set_, trust_remote_code)
    show(run(spec, out, overrides=overrides, smoke=smoke, resume=resume, overwrite=overwrite, quiet=quiet), json)
