"""Run a recipe: several jobs in one YAML, each step's output feeding the next.

    out: runs/demo
    steps:
      skills: {skills: {}}
      sort: {train: {base: toolkit:base, data: {train: "${skills}/sort.train.jsonl"}}}
      merged: {merge: {...}}

Every step has a name and one job; `${name}` stands for the folder of that step's output. Steps that do not need each
other may run side by side. A step is not run again while its spec, the files that it names, the steps that it needs and
the toolkit's version are as they were.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, NoReturn

from pydantic import Field, field_validator

from toolkit import specs
from toolkit.checkpoints.companions import versions
from toolkit.checkpoints.locate import EMBEDDED, locate
from toolkit.checkpoints.reader import read_json
from toolkit.checkpoints.writer import resolved, write_text
from toolkit.errors import CheckpointError, OutputError, Problem, SpecError
from toolkit.jobs.steps import KINDS, run_step, spec_class
from toolkit.jobs.worker import Worker
from toolkit.names import did_you_mean
from toolkit.progress import Board, State, board
from toolkit.specs import Folder, Spec
from toolkit.tables import Report, Table

RECORDS = ".steps"
_REFERENCE = re.compile(r"\$\{([^}]*)\}")


class RecipeSpec(Spec):
    """A recipe.

    Attributes:
        steps: name -> `{job: spec}`.
        out: folder that holds one folder per step.
        workers: steps that may run side by side, each in a process of its own; with 1 they run in this one.
        threads: of torch in each process, when there is more than one.
    """

    steps: Annotated[dict[str, dict[str, Any]], Field(min_length=1)]
    out: Folder | None = None
    workers: Annotated[int, Field(ge=1)] = 1
    threads: Annotated[int, Field(ge=1)] = 1

    @field_validator("steps")
    @classmethod
    def _one_job(cls, steps: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        for name, step in steps.items():
            if not re.fullmatch(r"[\w.-]+", name) or name.startswith("."):
                raise ValueError(f"{name!r}: a step's name is its folder's, of letters, digits, '.', '_' and '-'")
            if len(step) != 1:
                raise ValueError(f"{name}: a step is one job, such as train, got {', '.join(step) or 'none'}")
            kind = next(iter(step))
            if kind not in KINDS:
                raise ValueError(f"{name}: no job {kind!r}{did_you_mean(kind, KINDS)} (known: {', '.join(KINDS)})")
            if not isinstance(step[kind], Mapping | None):
                raise ValueError(f"{name}.{kind}: expected a spec, which is keys and values, got {step[kind]!r}")
        return steps


@dataclass(frozen=True)
class RecipeResult(Report):
    """A finished recipe.

    Attributes:
        path: folder that holds one folder per step.
        results: what each step reported.
    """

    path: Path = Path()
    results: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class _Step:
    name: str
    kind: str
    spec: Mapping[str, Any]
    needs: frozenset[str]
    fingerprint: str


_Run = Callable[[_Step], dict[str, Any]]


def run_recipe(
    spec: specs.Source | RecipeSpec,
    out: str | Path | None = None,
    *,
    overrides: Sequence[str] = (),
    smoke: bool = False,
    quiet: bool = False,
) -> RecipeResult:
    """Run the steps of a recipe that are not done yet.

    Args:
        spec: a YAML file, a dict or a `RecipeSpec`.
        out: folder to work in, instead of the recipe's own.
        overrides: `key.path=value` changes to the recipe.
        smoke: apply the recipe's own `smoke:` block.
        quiet: show no progress.

    Raises:
        SpecError: the recipe, or the spec of any step, is wrong; all that can be told before the first step runs is.
        OutputError: a folder that a step would write exists, and this recipe did not make it.
        ToolkitError: whatever a step raises; what was done stays, and the next run goes on from there.
    """
    loaded = specs.load(spec, RecipeSpec, overrides=overrides, smoke=smoke)
    if not (out or loaded.out):
        raise loaded.error([Problem("out", "required: the folder to work in")])
    folder = Path(os.path.expanduser(out or loaded.out or ""))
    steps = _order(loaded, folder)
    _check_specs(loaded, steps)
    _check_folders(steps, folder)
    with board(quiet=quiet) as shown, _Runners(loaded, folder, shown, quiet) as run:
        results, seconds = _run_all(steps, folder, run, loaded.workers)
    rows = [[step.name, step.kind, seconds.get(step.name)] for step in steps]
    tables = [Table(("step", "job", "seconds"), rows, str(folder))]
    return RecipeResult({"path": str(folder), "steps": results, "seconds": seconds}, tables, folder, results)


def _order(spec: RecipeSpec, folder: Path) -> list[_Step]:
    """Resolve references and put every step after those it needs."""
    found: dict[str, _Step] = {}
    problems: list[Problem] = []
    open_steps = dict(spec.steps)
    for name, step in spec.steps.items():
        unknown = _references(step) - set(spec.steps)
        problems += [Problem(f"steps.{name}", f"${{{u}}} is no step{did_you_mean(u, spec.steps)}") for u in unknown]
    if problems:
        raise spec.error(problems)
    while open_steps:
        ready = [name for name, step in open_steps.items() if _references(step) <= set(found)]
        if not ready:
            circle = ", ".join(open_steps)
            raise spec.error([Problem("steps", f"these steps need each other in a circle: {circle}")])
        for name in ready:
            kind, raw = next(iter(open_steps.pop(name).items()))
            needs = frozenset(_references(raw))
            version = versions().get("composition-toolkit")
            inputs = sorted(found[n].fingerprint for n in needs)
            identity = json.dumps([kind, raw, inputs, _outside(raw), version], sort_keys=True, default=str)
            digest = hashlib.blake2b(identity.encode(), digest_size=16).hexdigest()
            found[name] = _Step(name, kind, _resolve(raw or {}, folder), needs, digest)
    return list(found.values())


def _check_specs(spec: RecipeSpec, steps: Sequence[_Step]) -> None:
    """Check the spec of every step against its job, before any of them runs."""
    problems: list[Problem] = []
    for step in steps:
        data = {key: value for key, value in step.spec.items() if key != "smoke"}
        model = spec_class(step.kind)
        if "out" in data and "out" in model.model_fields:
            problems.append(Problem(_place(step, "out"), "a step writes to its own folder; leave it out"))
        try:
            specs.validate(data, model)
        except SpecError as error:
            problems += [Problem(_place(step, p.where), p.message) for p in error.problems]
    if problems:
        raise spec.error(problems)


def _place(step: _Step, where: str) -> str:
    return f"steps.{step.name}.{step.kind}" + (f".{where}" if where else "")


def _check_folders(steps: Sequence[_Step], folder: Path) -> None:
    """Make the folder, and refuse to replace anything in it that no step of a recipe made."""
    try:
        (folder / RECORDS).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        what = "is a file; name a folder" if folder.is_file() else f"cannot be made ({error.strerror})"
        raise OutputError(f"{folder}: {what}") from None
    for step in steps:
        place = resolved(folder / step.name)
        empty = not place.exists() or (place.is_dir() and not any(place.iterdir()))
        if not empty and not _record(step, folder).is_file():
            raise OutputError(
                f"{folder / step.name}: exists already and is not this recipe's; move it away, or name another folder"
            )


def _record(step: _Step, folder: Path) -> Path:
    return folder / RECORDS / f"{step.name}.json"


def _outside(value: Any) -> list[Any]:
    """Return what identifies the files that a step's spec names: names, sizes and times of change.

    Of a folder its own files count, not those of folders in it. `a+b` names two.
    """
    if isinstance(value, Mapping):
        return [found for key in sorted(value, key=str) for found in _outside(value[key])]
    if isinstance(value, list | tuple):
        return [found for inner in value for found in _outside(inner)]
    if not isinstance(value, str | Path) or _REFERENCE.search(str(value)):
        return []
    return [found for part in dict.fromkeys([str(value), *str(value).split("+")]) for found in _state(part)]


def _state(name: str) -> list[Any]:
    path = str(locate(EMBEDDED)) if name == EMBEDDED else os.path.expanduser(name)
    try:
        if not name or not os.path.isdir(path):
            files = [(name, os.stat(path))] if name and os.path.isfile(path) else []
        else:
            with os.scandir(path) as entries:
                files = sorted((entry.name, entry.stat()) for entry in entries if entry.is_file())
    except OSError:  # the job says what is wrong with it
        return []
    return [[file, found.st_size, found.st_mtime_ns] for file, found in files]


def _references(value: Any) -> set[str]:
    if isinstance(value, Mapping):
        return {r for inner in value.values() for r in _references(inner)}
    if isinstance(value, list):
        return {r for inner in value for r in _references(inner)}
    return set(_REFERENCE.findall(value)) if isinstance(value, str) else set()


def _resolve(value: Any, folder: Path) -> Any:
    if isinstance(value, Mapping):
        return {key: _resolve(inner, folder) for key, inner in value.items()}
    if isinstance(value, list):
        return [_resolve(inner, folder) for inner in value]
    return _REFERENCE.sub(lambda m: str(folder / m[1]), value) if isinstance(value, str) else value


def _run_all(
    steps: Sequence[_Step], folder: Path, run: _Run, workers: int
) -> tuple[dict[str, dict[str, Any]], dict[str, float]]:
    """Run every step once what it needs is done, several at a time."""
    results: dict[str, dict[str, Any]] = {}
    seconds: dict[str, float] = {}
    waiting = list(steps)
    running: dict[Future[dict[str, Any]], tuple[_Step, float]] = {}
    with ThreadPoolExecutor(workers) as pool:
        while waiting or running:
            for step in [s for s in waiting if s.needs <= results.keys()]:
                done = _recorded(step, folder)
                if done is not None:
                    results[step.name] = done
                    waiting.remove(step)
                elif len(running) < workers:
                    _claim(step, folder)
                    running[pool.submit(run, step)] = step, time.perf_counter()
                    waiting.remove(step)
            if not running:
                continue
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                step, started = running.pop(future)
                results[step.name] = future.result()
                seconds[step.name] = round(time.perf_counter() - started, 2)
                record = {"fingerprint": step.fingerprint, "kind": step.kind, "result": results[step.name]}
                write_text(_record(step, folder), json.dumps(record) + "\n")
    return results, seconds


def _claim(step: _Step, folder: Path) -> None:
    """Note that the step's folder is the recipe's own, so that it may be replaced even if this run is killed."""
    if not _record(step, folder).is_file():
        write_text(_record(step, folder), json.dumps({"kind": step.kind}) + "\n")


def _recorded(step: _Step, folder: Path) -> dict[str, Any] | None:
    """Return the result of a step that was done already, with the same spec and the same inputs."""
    path = _record(step, folder)
    if not path.is_file() or not (folder / step.name).exists():
        return None
    try:
        record = read_json(path)
    except CheckpointError:  # cut off: as if the step had not been run
        return None
    result = record.get("result")
    return result if record.get("fingerprint") == step.fingerprint and isinstance(result, dict) else None


class _Runners:
    """Gives `run(step)`: in this process, or in one of several others that stay for all steps."""

    def __init__(self, spec: RecipeSpec, folder: Path, shown: Board, quiet: bool) -> None:
        self.spec, self.folder, self.shown, self.quiet = spec, folder, shown, quiet
        self.idle: list[Worker] = []
        self.lock = threading.Lock()

    def __enter__(self) -> _Run:
        return self._here if self.spec.workers == 1 else self._elsewhere

    def __exit__(self, *error: object) -> None:
        for worker in self.idle:
            worker.stop()

    def _here(self, step: _Step) -> dict[str, Any]:
        try:
            return run_step(step.kind, step.spec, self.folder / step.name, quiet=self.quiet)
        except SpecError as error:
            self._explain(step, error)

    def _elsewhere(self, step: _Step) -> dict[str, Any]:
        with self.lock:
            worker = self.idle.pop() if self.idle else None
        worker = worker or Worker(self.spec.threads, self.folder / RECORDS / "workers.log")
        try:
            return worker.run(step.kind, step.spec, self.folder / step.name, lambda state: self._show(step, state))
        except SpecError as error:
            self._explain(step, error)
        finally:
            with self.lock:
                self.idle.append(worker)

    def _explain(self, step: _Step, error: SpecError) -> NoReturn:
        """Raise the faults of a step's spec as faults of the recipe, at their key paths and lines in it."""
        raise self.spec.error([Problem(_place(step, p.where), p.message) for p in error.problems]) from None

    def _show(self, step: _Step, state: State) -> None:
        with self.lock:
            self.shown.show(step.name, State(step.name, state.total, state.done, state.unit, state.text))
