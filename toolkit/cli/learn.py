"""`toolkit learn`."""

from __future__ import annotations

from toolkit.cli.common import Json, Out, Overwrite, Quiet, Resume, Set, Smoke, SpecFile, show


def learn(
    spec: SpecFile,
    out: Out = None,
    set_: Set = [],  # noqa: B006 - typer reads the default, nobody changes it
    resume: Resume = False,
    overwrite: Overwrite = False,
    smoke: Smoke = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Learn the coefficients of a merge from data: AdaMerging, aTLAS, Self Positioning, LoraHub, TALL masks."""
    from toolkit.merge.learning.learn import learn as run

    show(run(spec, out, overrides=set_, smoke=smoke, resume=resume, overwrite=overwrite, quiet=quiet), json)
