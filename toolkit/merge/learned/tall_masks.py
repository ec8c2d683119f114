"""TALL masks: fine-tunes as one shared vector and a bit mask each, every mask's threshold chosen on validation rows.

A mask keeps an element of the sum of all task vectors where `|tau_t| > lambda_t * |tau - tau_t|`. For each of
`lambdas` the folder of compressed deltas is written, and every task is measured with its own mask as it will be read
later; a task's lambda is the one with the most right predictions on its rows, of several the first. The result is
`compressed`, a folder of `toolkit extract --as mask`, and no merged model: `compressed#TASK` is a model for merging,
serving and Python.

Wang et al., "Localizing Task Information for Improved Model Merging and Compression", 2024 (arXiv:2405.07813).
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from contextlib import closing
from typing import Annotated, Any

from pydantic import Field

from toolkit.checkpoints.compressed import on_base, open_compressed
from toolkit.errors import Problem
from toolkit.merge.extract import Extraction, extract
from toolkit.merge.learning.session import Outcome, Session
from toolkit.merge.learning.spec import LearnParams, LearnSpec
from toolkit.progress import track
from toolkit.tables import Cell, Table

COMPRESSED, CANDIDATE = "compressed", "candidate"


class Params(LearnParams):
    """Parameters of `tall_masks`.

    Attributes:
        lambdas: candidates of every task's threshold; larger ones keep less.
        vector: dtype of the shared vector, such as `float16`; by default the base's own.
    """

    lambdas: Annotated[tuple[Annotated[float, Field(ge=0)], ...], Field(min_length=1)] = (0.2, 0.3, 0.4, 0.5, 0.6)
    vector: str | None = None


def check(spec: LearnSpec, params: Params) -> list[Problem]:
    """Find models whose thresholds could not be measured."""
    return [
        Problem(f"tasks.{name}", "required: rows of this model's own task, to choose its threshold on")
        for name in spec.models
        if spec.tasks and name not in spec.tasks
    ]


def learn(session: Session, params: Params) -> Outcome:
    """Choose the thresholds and write the masks."""
    scores = {value: _measured(session, params, value) for value in params.lambdas}
    names = session.vectors.names
    chosen = {name: max(params.lambdas, key=lambda value, n=name: scores[value][n]) for name in names}
    result = _extract(session, params, list(chosen.values()), COMPRESSED)
    own = _own_accuracy(session)
    rows: list[list[Cell]] = [[name, chosen[name], scores[chosen[name]][name], own[name]] for name in names]
    means = [sum(float(row[column] or 0) for row in rows) / len(rows) for column in (2, 3)]
    rows.append(["mean", None, *means])
    title = f"percent right on the rows that the thresholds were chosen on; {result.tables[0].rows[3][1]}"
    numbers: dict[str, Any] = {
        "lambda": chosen,
        "accuracy": {name: scores[chosen[name]][name] for name in names},
        "individual": own,
        "candidates": {str(value): found for value, found in scores.items()},
        "bytes": result.numbers["bytes_after"],
        "bytes_before": result.numbers["bytes_before"],
    }
    return Outcome(None, numbers, [Table(("model", "lambda", "masked", "its own"), rows, title)], "texts and labels")


def _measured(session: Session, params: Params, value: float) -> Mapping[str, float]:
    """Write all masks with one threshold; return the percent of right predictions of every task."""
    _extract(session, params, [value], CANDIDATE)
    folder = session.folder / CANDIDATE
    found: dict[str, float] = {}
    with track(f"lambda {value:g}", len(session.tasks), unit="tasks", quiet=session.quiet) as progress:
        for name in session.vectors.names:
            with closing(open_compressed(f"{folder}#{name}")) as compressed:
                session.engine.fill(on_base(session.base, compressed))
            found[name] = _accuracy(session, name)
            progress.advance()
    shutil.rmtree(folder)
    return found


def _own_accuracy(session: Session) -> Mapping[str, float]:
    found = {}
    for index, name in enumerate(session.vectors.names):
        session.engine.expert(index)
        found[name] = _accuracy(session, name)
    return found


def _accuracy(session: Session, name: str) -> float:
    from toolkit.merge.learning.objective import accuracy

    return accuracy(session, next(task for task in session.tasks if task.name == name))


def _extract(session: Session, params: Params, lambdas: Sequence[float], out: str) -> Extraction:
    options = {"lambda": list(lambdas)} | ({"dtype": params.vector} if params.vector else {})
    models = dict(zip(session.vectors.names, session.vectors.sources, strict=True))
    folder = session.folder / out
    return extract(session.spec.base_model, models, folder, kind="mask", overwrite=True, quiet=True, **options)
