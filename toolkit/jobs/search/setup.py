"""What a search needs to know before it measures anything: all that is wrong with its spec, and its identity."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from toolkit.checkpoints.adapters import is_adapter, open_adapter
from toolkit.checkpoints.companions import file_hashes
from toolkit.checkpoints.locate import locate
from toolkit.data.rows import Row, read_rows, split_answer, write_rows
from toolkit.errors import DataError, Problem, SpecError
from toolkit.evaluation.spec import TaskSpec
from toolkit.jobs.search.methods import budget_of
from toolkit.jobs.search.space import Space, make_space
from toolkit.jobs.search.spec import ROWS, SearchSpec
from toolkit.merge.groups import groups_of
from toolkit.merge.plan import Plan, make_plan
from toolkit.merge.spec import MergeSpec

Tasks = Mapping[str, TaskSpec]

Source = str | Mapping[str, Any]
"""A model that is measured: a folder or a hub id, or the spec of a merge."""

PROBES = (0.0, 0.382, 1.0)
"""Where between the bounds a merge is planned beforehand, so that values that it refuses are told before the search."""


@dataclass(frozen=True)
class Setup:
    """A checked search.

    Attributes:
        spec: what was asked for.
        space: the free numbers of its merge.
        budget: candidates that are measured at most.
        base: model that deltas are taken from and adapters belong to, where there is one.
        inputs: the merge's models, by the name of their rows. As the base, one that is a merge itself is its spec.
        fingerprint: changes when the spec, the models' files or the data do.
    """

    spec: SearchSpec
    space: Space
    budget: int
    base: Source | None
    inputs: Mapping[str, Source]
    fingerprint: str


def set_up(spec: SearchSpec) -> Setup:
    """Check everything that can be checked without a model in memory.

    Raises:
        SpecError: the search, or the merge at its start or at its bounds, is wrong.
        MissingError: no such data file.
        DataError: a row without an answer where one is needed.
    """
    for task in (*spec.tasks.values(), *spec.test.values()):
        _rows(task)
    merge = _merge(spec)
    space, problems = make_space(merge, spec.search)
    budget, more = budget_of(spec.search, space)
    problems += [] if problems else more
    if problems:
        raise spec.error(problems)
    with placed(spec):
        for position in PROBES:
            make_plan(space.spec(space.values([position] * len(space.free)))).inputs.close()
        plan = make_plan(merge)
    plan.inputs.close()
    base = merge.get("base_model") or (plan.inputs.base.source if plan.inputs.base else None)
    return Setup(spec, space, budget, base, _labels(spec, plan), _fingerprint(spec, plan))


@contextmanager
def placed(spec: SearchSpec) -> Iterator[None]:
    """Raise the faults of the merge's spec as faults of the search's, at their key paths and lines in it."""
    try:
        yield
    except SpecError as error:
        raise spec.error([Problem(_place(spec, p.where), p.message) for p in error.problems]) from None


def hold_out(spec: SearchSpec, folder: Path) -> tuple[Tasks, Tasks]:
    """Return the tasks to tune on and those for the table, which are none without data of their own.

    With `holdout` the rows of each task are dealt to two files in `folder`, evenly over the task's length.

    Raises:
        DataError: a task with too few rows for both.
    """
    if spec.holdout is None:
        return spec.tasks, spec.test
    tuning, table = {}, {}
    folder.mkdir(exist_ok=True)
    for name, task in spec.tasks.items():
        rows = _rows(task)
        out = [int((i + 1) * spec.holdout) > int(i * spec.holdout) for i in range(len(rows))]
        if all(out) or not any(out):
            share = f"{sum(out)} of {len(rows)} rows"
            raise DataError(f"tasks.{name}: holdout {spec.holdout:g} takes {share}; both sides need one at least")
        for part, tasks, wanted in (("tuning", tuning, False), ("test", table, True)):
            file = folder / f"{quote(name, safe='')}.{part}.jsonl"
            write_rows(file, [row.data for row, held in zip(rows, out, strict=True) if held is wanted])
            tasks[name] = task.model_copy(update={"data": [str(file)], "limit": None})
    return tuning, table


def parts(model: str, base: Source | None) -> tuple[Source, str | None]:
    """Return what an input is measured with: a full model, and the adapter on it where the input is one."""
    if "+" in model and not Path(model).exists():
        own, _, adapter = model.partition("+")
        return own, adapter
    path = locate(model)
    return (base, model) if base is not None and path.is_dir() and is_adapter(path) else (model, None)


def _rows(task: TaskSpec) -> list[Row]:
    rows = read_rows(task.data)[: task.limit]
    if task.metric == "exact_match":
        for row in rows:
            split_answer(row)
    return rows


def _merge(spec: SearchSpec) -> dict[str, Any]:
    """Return the merge to tune as plain data, as a user would write it."""
    if spec.merge is not None:
        problems = [Problem(_place(spec, where), _UNNAMED) for where in _unnamed(spec.merge)]
        if problems:
            raise spec.error(problems)
        return _plain(spec.merge)
    weight = float(f"{1 / len(spec.models):.4g}")
    models = [{"model": model, "parameters": {"weight": weight}} for model in spec.models.values()]
    merge = {"merge_method": "task_arithmetic", "base_model": spec.base, "models": models}
    return merge | ({"output": {"type": "adapter"}} if all(map(_adds_up, spec.models.values())) else {})


_UNNAMED = "a folder or a hub id is needed here, for the result is a YAML"


def _unnamed(merge: MergeSpec, prefix: str = "") -> Iterator[str]:
    """Yield the key paths of models that no YAML can name."""
    for group in groups_of(merge):
        named = [("base_model", group.base_model), *((f"{slot.path}.model", slot.model) for slot in group.slots)]
        for where, model in named:
            if isinstance(model, MergeSpec):
                yield from _unnamed(model, f"{prefix}{where}.")
            elif not isinstance(model, str | None):
                yield f"{prefix}{where}"


def _plain(merge: MergeSpec) -> dict[str, Any]:
    return merge.model_dump(mode="json", by_alias=True, exclude_unset=True)


def _adds_up(model: str) -> bool:
    """Tell whether an input is a LoRA whose sums with others are LoRAs: no DoRA, and nothing stored whole."""
    path = locate(model)
    if not (path.is_dir() and is_adapter(path)):
        return False
    adapter = open_adapter(model)
    adapter.store.close()
    return not adapter.whole and not any(part.magnitude for part in adapter.parts.values())


def _labels(spec: SearchSpec, plan: Plan) -> dict[str, Source]:
    """Name the inputs: as the spec does, else by the last part of their paths where that is theirs alone."""
    if spec.merge is None:
        return dict(spec.models)
    merges = {m.weights.source: m.slot.model for m in plan.inputs.models if isinstance(m.slot.model, MergeSpec)}
    models = list(dict.fromkeys(m.slot.model for m in plan.inputs.models if isinstance(m.slot.model, str)))
    short = [model.rstrip("/").rpartition("/")[2] for model in models]
    unique = [name not in ROWS and short.count(name) == 1 for name in short]
    named: dict[str, Source] = {
        name if is_own else model: model for name, is_own, model in zip(short, unique, models, strict=True)
    }
    return named | {label: _plain(merge) for label, merge in merges.items()}


def _fingerprint(spec: SearchSpec, plan: Plan) -> str:
    files = [file for task in (*spec.tasks.values(), *spec.test.values()) for file in task.data]
    hashes = [file_hashes([Path(file).expanduser()]) for file in files]
    what = [spec.model_dump(mode="json", by_alias=True, exclude={"out", "merged"}), plan.fingerprint(), hashes]
    return hashlib.blake2b(json.dumps(what, sort_keys=True).encode(), digest_size=16).hexdigest()


def _place(spec: SearchSpec, where: str) -> str:
    """Turn a key path of the merge into one of the search, where the merge may have no block of its own."""
    if spec.merge is not None:
        return where if spec.is_merge_spec else f"merge.{where}" if where else "merge"
    if where.startswith("base_model"):
        return "base"
    index = where.removeprefix("models[").partition("]")[0]
    return f"models.{list(spec.models)[int(index)]}" if index.isdecimal() else "models"
