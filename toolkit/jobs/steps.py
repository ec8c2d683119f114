"""The jobs that a recipe's step can be: each takes a spec and writes one folder."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from toolkit.checkpoints.writer import staging_path
from toolkit.errors import OutputError
from toolkit.specs import Spec


class Job(NamedTuple):
    """Where a job is; both are imported when they are needed.

    Attributes:
        function: that does it.
        spec: class of its specs.
    """

    function: str
    spec: str


KINDS = {
    "skills": Job("toolkit.jobs.skills:write_skills", "toolkit.jobs.skills:SkillsSpec"),
    "corpus": Job("toolkit.jobs.corpus:write_corpus", "toolkit.jobs.corpus:CorpusSpec"),
    "train": Job("toolkit.adapters.train:train", "toolkit.adapters.spec:TrainSpec"),
    "transfer": Job("toolkit.adapters.transfer.trans_lora:transfer", "toolkit.adapters.transfer.spec:TransferSpec"),
    "merge": Job("toolkit.merge.run:merge", "toolkit.merge.spec:MergeSpec"),
    "moe": Job("toolkit.merge.moe.build:build_moe", "toolkit.merge.moe.spec:MoeSpec"),
    "search": Job("toolkit.jobs.search.run:search", "toolkit.jobs.search.spec:SearchSpec"),
    "learn": Job("toolkit.merge.learning.learn:learn", "toolkit.merge.learning.spec:LearnSpec"),
    "extract": Job("toolkit.merge.extract:run_extract", "toolkit.merge.extract:ExtractSpec"),
    "route": Job("toolkit.routing.fit:fit_router", "toolkit.routing.spec:RouteSpec"),
    "evaluate": Job("toolkit.jobs.evaluate:evaluate", "toolkit.evaluation.spec:EvaluateSpec"),
    "evaluate_router": Job("toolkit.jobs.route:evaluate_router", "toolkit.routing.spec:RouteEvaluateSpec"),
}
"""Every job by its name."""


RESUMABLE = ("train", "transfer", "merge", "search", "learn")
"""Jobs that go on from where a kill left them."""


def spec_class(kind: str) -> type[Spec]:
    """Return the class that describes the specs of a job."""
    return _import(KINDS[kind].spec)


def run_step(kind: str, spec: Mapping[str, Any], out: Path, *, quiet: bool = False) -> dict[str, Any]:
    """Run one job into a folder, replacing what is there; return its numbers.

    The caller knows that what is there is of an earlier run of the same step.
    """
    job = _import(KINDS[kind].function)
    if kind in RESUMABLE and staging_path(out).exists():
        try:
            return job(spec, out, overwrite=True, quiet=quiet, resume=True).to_dict()
        except OutputError:  # what was left there is of another spec, or nothing to go on from
            pass
    return job(spec, out, overwrite=True, quiet=quiet).to_dict()


def _import(place: str) -> Any:
    module, _, name = place.partition(":")
    return getattr(importlib.import_module(module), name)
