"""The second table: the same models on shifted inputs, merges adapted to these, and signatures as patches."""

from __future__ import annotations

from collections.abc import Callable

from benchmarks.eight_tasks.data import SHIFTS
from benchmarks.eight_tasks.rows import UNLABELLED, Row, learned, mean, run_learned
from benchmarks.eight_tasks.study import Study
from toolkit.merge.run import merge

WEIGHTS = (0.25, 0.5, 1.0)
"""Of a signature; the best on the source task's shifted validation rows is taken."""


def all_shifted_rows(study: Study) -> dict[str, dict[str, Row]]:
    """Measure every row on every kind of shifted test rows; shift -> row -> what was measured."""
    return {shift: _rows_of(study, shift) for shift in SHIFTS}


def source_task(study: Study) -> str:
    """Return the task that signatures are made on: the first with the most training rows."""
    return max(study.tasks, key=lambda name: len(study.tasks[name].texts["train"]))


def _rows_of(study: Study, shift: str) -> dict[str, Row]:
    jobs: dict[str, Callable[[], Row]] = {
        "zero-shot": lambda: _model(study, study.base, shift),
        "individual": lambda: {
            "accuracy": study.measure_each(study.individual, "test", shift),
            "data": "training rows",
        },
        "individual, patched by a signature": lambda: _patched(study, shift),
        "joint training": lambda: _model(study, str(study.folder / "joint"), shift),
        "weight averaging": lambda: _averaged(study, shift),
    }
    for name in ("AdaMerging (layer)", "aTLAS"):
        jobs[name] = lambda name=name: _learned(study, name, shift, None)
        jobs[f"{name}, on shifted texts"] = lambda name=name: _learned(study, name, shift, shift)
    return {name: study.row(f"{shift}/{name}", job) for name, job in jobs.items()}


def _model(study: Study, source: str, shift: str) -> Row:
    study.use(source)
    return {"accuracy": study.measure("test", shift), "data": ""}


def _averaged(study: Study, shift: str) -> Row:
    out = study.folder / "merged"
    models = [{"model": model} for model in study.individual.values()]
    spec = {"merge_method": "linear", "base_model": study.base, "models": models, "parameters": {"weight": 1}}
    merge(spec, out, overwrite=True, quiet=study.quiet)
    row = _model(study, str(out), shift)
    study.forget("merged")
    return row


def _learned(study: Study, name: str, shift: str, data: str | None) -> Row:
    """Measure a merge that was learned on clean rows, or adapted by entropy to shifted ones without labels."""
    given = learned(study)[name]
    if data is not None:
        given = {**given, "loss": "entropy"}
    out = run_learned(study, name, given, data)
    return _model(study, str(out / "merged"), shift) | {"data": UNLABELLED if data else "clean rows"}


def _patched(study: Study, shift: str) -> Row:
    """Add the signature of a shift, made on one task, to the fine-tunes of all of them."""
    source = source_task(study)
    corrupt = study.make(f"corrupt/{shift}", lambda out: study.tune_on(source, shift, out))
    best = max(WEIGHTS, key=lambda weight: _patch_score(study, source, str(corrupt), weight, shift))
    scores: dict[str, float] = {}
    for name in study.tasks:
        _patch(study, source, str(corrupt), name, best)
        scores |= study.measure("test", shift, [name])
    study.forget("patched")
    return {"accuracy": scores, "weight": best, "data": f"training rows of {source}, shifted"}


def _patch_score(study: Study, source: str, corrupt: str, weight: float, shift: str) -> float:
    _patch(study, source, corrupt, source, weight)
    return mean(study.measure("validation", shift, [source]))


def _patch(study: Study, source: str, corrupt: str, task: str, weight: float) -> None:
    """Give the model the weights of a task's fine-tune and the signature, by `signatures`."""
    models = [
        {"model": study.individual[source], "parameters": {"role": "clean"}},
        {"model": corrupt, "parameters": {"role": "corrupt", "weight": weight}},
    ]
    if task != source:
        models.append({"model": study.individual[task], "parameters": {"role": "target"}})
    spec = {"merge_method": "signatures", "base_model": study.base, "models": models}
    merge(spec, study.folder / "patched", overwrite=True, quiet=True)
    study.use(str(study.folder / "patched"))
