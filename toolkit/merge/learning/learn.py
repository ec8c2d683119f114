"""Learn the coefficients of a merge, and write them as a plain merge spec with the merged model."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import yaml
from pydantic import ValidationError

from toolkit import names, specs
from toolkit.checkpoints.companions import file_hashes
from toolkit.checkpoints.writer import LOCK, check_free, clear, commit, locked, staging_path, write_text
from toolkit.errors import Problem, SpecError, UnsupportedError
from toolkit.merge.learning.blocks import Blocks, merge_spec
from toolkit.merge.learning.session import Outcome, Session
from toolkit.merge.learning.spec import CoefficientParams, LearnParams, LearnSpec
from toolkit.merge.learning.vectors import TaskVectors
from toolkit.merge.run import merge
from toolkit.tables import Cell, Report, Table

METHODS = "toolkit.merge.learned"
MERGE, MERGED, STAMP = "merge.yaml", "merged", "learn.json"
"""What is written: the learned merge as a spec, what it gives, and while it is unfinished of which spec it is."""


@dataclass(frozen=True)
class LearnResult(Report):
    """A learned merge.

    Attributes:
        path: folder that was written.
        coefficients: model -> group of tensors -> coefficient.
    """

    path: Path = Path()
    coefficients: Mapping[str, Mapping[str, float]] = field(default_factory=dict)


def learn(
    spec: specs.Source | LearnSpec,
    out: str | Path | None = None,
    *,
    overrides: Sequence[str] = (),
    smoke: bool = False,
    resume: bool = False,
    overwrite: bool = False,
    quiet: bool = False,
) -> LearnResult:
    """Learn the coefficients of a merge from data.

    Memory holds one float32 model and its gradients, whatever the number of fine-tunes.

    Args:
        spec: a YAML file, a dict or a `LearnSpec`.
        out: folder to write, instead of the spec's own; it appears only when it is whole: `merge.yaml`, the merged
            model in `merged`, and `results.json`.
        overrides: `key.path=value` changes to the spec.
        smoke: apply the spec's own `smoke:` block.
        resume: go on with a run into `out` that was stopped.
        overwrite: replace `out` if it exists.
        quiet: show no progress.

    Raises:
        SpecError: everything that is wrong with the spec and the way its models fit, before a model is loaded.
        MissingError: no such data file, or no such head.
        DataError: a row that cannot be used.
        UnsupportedError: models that cannot be run.
        OutputError: `out` exists, or cannot be written.
    """
    loaded = specs.load(spec, LearnSpec, overrides=overrides, smoke=smoke)
    if not (out or loaded.out):
        raise loaded.error([Problem("out", "required: the folder to write")])
    folder = Path(os.path.expanduser(out or loaded.out or ""))
    check_free(folder, overwrite=overwrite)
    method, params = _method(loaded)
    vectors = _vectors(loaded, params)
    try:
        blocks = _blocks(vectors, params)
        with locked(staging_path(folder)) as partial:
            fingerprint = _fingerprint(loaded, vectors)
            _begin(partial, fingerprint, resume)
            session = Session(loaded, params, vectors, blocks, partial, fingerprint, quiet)
            try:
                outcome: Outcome = method.learn(session, params)
                result = _write(session, outcome, folder)
                (partial / STAMP).unlink()
                commit(partial, folder)
            finally:
                _remove_empty(partial)
    finally:
        vectors.close()
    return result


def _method(spec: LearnSpec) -> tuple[ModuleType, LearnParams]:
    """Return a spec's method and its checked parameters.

    Raises:
        SpecError: an unknown method, wrong parameters, or tasks that do not fit the method.
    """
    try:
        method = names.load(METHODS, spec.method, "learned method")
    except UnsupportedError as error:
        raise spec.error([Problem("method", str(error))]) from None
    try:
        params: LearnParams = method.Params.model_validate(spec.parameters)
    except ValidationError as error:
        found = specs.problems(error, spec.parameters, method.Params, spec._lines, "parameters.")
        raise spec.error([Problem(p.where.rstrip("."), p.message) for p in found]) from None
    from toolkit.merge.learning.tasks import task_problems

    found = task_problems(spec, params.model_dump(), getattr(method, "NEEDS_DATA", True))
    if hasattr(method, "check"):
        found += method.check(spec, params)
    if found:
        raise spec.error(found)
    return method, params


def _vectors(spec: LearnSpec, params: LearnParams) -> TaskVectors:
    density = getattr(params, "density", None)
    try:
        vectors = TaskVectors(spec.base_model, spec.models, density=density, keep=spec.keep or 0)
    except SpecError as error:
        raise spec.error(error.problems) from None
    if not vectors.jobs:
        vectors.close()
        raise UnsupportedError(f"{', '.join(spec.models)}: no tensor differs from {vectors.base.source}")
    return vectors


def _blocks(vectors: TaskVectors, params: LearnParams) -> Blocks:
    names = list(vectors.jobs)
    return Blocks(names, params.granularity, params.groups) if isinstance(params, CoefficientParams) else Blocks(names)


def _fingerprint(spec: LearnSpec, vectors: TaskVectors) -> str:
    files = [Path(file).expanduser() for task in spec.tasks.values() for file in task.data]
    heads = [Path(task.head) / name for task in spec.tasks.values() if task.head for name in _HEAD]
    hashes = [file_hashes([file]) for file in (*files, *heads) if file.is_file()]
    what = [spec.model_dump(mode="json", exclude={"out", "merged", "keep"}), vectors.plan.fingerprint(), hashes]
    return hashlib.blake2b(json.dumps(what, sort_keys=True).encode(), digest_size=16).hexdigest()


_HEAD = ("head.json", "head.safetensors")


def _begin(partial: Path, fingerprint: str, resume: bool) -> None:
    """Empty the staging folder, unless it holds this very run and is to be gone on with."""
    stamp = partial / STAMP
    if not (resume and stamp.is_file() and stamp.read_text(encoding="utf-8") == fingerprint):
        clear(partial)
        write_text(stamp, fingerprint)


def _remove_empty(partial: Path) -> None:
    """Remove a staging folder that holds nothing to go on from."""
    if partial.exists() and {entry.name for entry in partial.iterdir()} <= {STAMP, LOCK}:
        shutil.rmtree(partial)


def _write(session: Session, outcome: Outcome, out: Path) -> LearnResult:
    spec, values, folder = session.spec, outcome.values, session.folder
    numbers: dict[str, Any] = {"path": str(out), "method": spec.method, "data": outcome.data, **outcome.numbers}
    numbers["rows"] = {task.name: task.size for task in session.tasks} if spec.tasks else {}
    tables = list(outcome.tables)
    coefficients: dict[str, dict[str, float]] = {}
    if values is not None:
        groups = session.blocks.groups
        coefficients = {
            name: dict(zip(groups, map(float, row), strict=True))
            for name, row in zip(session.vectors.names, values, strict=True)
        }
        numbers["coefficients"] = coefficients
        tables.insert(0, _table(session, values))
        _write_merge(session, outcome)
    result = LearnResult(numbers, tables, out, coefficients)
    write_text(folder / "results.json", json.dumps(numbers, indent=2) + "\n")
    write_text(folder / "results.md", "\n\n".join(table.to_markdown() for table in tables) + "\n")
    return result


def _write_merge(session: Session, outcome: Outcome) -> None:
    spec, vectors, values = session.spec, session.vectors, outcome.values
    assert values is not None
    plain = merge_spec(vectors.template, vectors.sources, session.blocks, values, spec.dtype)
    if all(isinstance(model, str) for model in (spec.base_model, *vectors.sources)):
        head = f"# Learned by {spec.method} from {outcome.data}.\n"
        text = yaml.safe_dump(plain, sort_keys=False, allow_unicode=True)
        write_text(session.folder / MERGE, head + text)
    if spec.merged:
        merge(plain, session.folder / MERGED, overwrite=True, quiet=session.quiet)


def _table(session: Session, values: np.ndarray) -> Table:
    """Return the coefficients, or where there are many their mean and range."""
    title = f"coefficients by {session.spec.method}"
    groups = session.blocks.groups
    columns: list[str] = ["model", *(groups if len(groups) > 1 else ["coefficient"])]
    rows: list[list[Cell]] = [[n, *map(float, row)] for n, row in zip(session.vectors.names, values, strict=True)]
    if len(groups) > _MOST_COLUMNS:
        columns = ["model", "mean", "smallest", "largest"]
        rows = [[r[0], *(float(f(v)) for f in _SUMMARY)] for r, v in zip(rows, values, strict=True)]
        title += f", {len(groups)} for each model"
    return Table(columns, rows, title, 4)


_MOST_COLUMNS = 8
_SUMMARY: tuple[Callable[[np.ndarray], Any], ...] = (np.mean, np.min, np.max)
