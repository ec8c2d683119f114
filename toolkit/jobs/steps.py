"""The jobs that a recipe's step can be: each takes a spec and writes one folder."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from toolkit.checkpoints.writer import staging_path
from toolkit.errors import OutputError

KINDS = {
    "skills": "toolkit.jobs.skills:write_skills",
    "corpus": "toolkit.jobs.corpus:write_corpus",
    "train": "toolkit.adapters.train:train",
    "merge": "toolkit.merge.run:merge",
    "route": "toolkit.routing.router:fit_router",
    "evaluate": "toolkit.jobs.evaluate:evaluate",
    "evaluate_router": "toolkit.jobs.route:evaluate_router",
}
"""Job -> function, imported when it is needed."""


RESUMABLE = ("train", "merge")
"""Jobs that go on from where a kill left them."""


def run_step(kind: str, spec: Mapping[str, Any], out: Path, *, quiet: bool = False) -> dict[str, Any]:
    """Run one job into a folder, replacing what an earlier run with another spec left there; return its numbers."""
    module, _, name = KINDS[kind].partition(":")
    job = getattr(importlib.import_module(module), name)
    if kind in RESUMABLE and staging_path(out).exists():
        try:
            return job(spec, out, overwrite=True, quiet=quiet, resume=True).to_dict()
        except OutputError:  # what was left there is of another spec, or nothing to go on from
            pass
    return job(spec, out, overwrite=True, quiet=quiet).to_dict()
