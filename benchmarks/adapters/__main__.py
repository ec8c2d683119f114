"""Compare adapter methods on a list of tasks: python -m benchmarks.adapters LIST.yaml OUT [--data FOLDER]."""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from benchmarks.adapters.data import LONGEST, write_tasks
from benchmarks.adapters.spec import CompareSpec, Contender
from benchmarks.measure import machine
from toolkit import specs
from toolkit.checkpoints.companions import versions
from toolkit.checkpoints.writer import write_text
from toolkit.errors import ToolkitError
from toolkit.progress import track
from toolkit.tables import Cell, Table, human_bytes

if TYPE_CHECKING:
    from benchmarks.adapters.trial import Trials

BASE = "base"
"""The row of the base as it is."""


def arguments(given: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.adapters", description=__doc__)
    parser.add_argument("spec", type=Path, help="YAML list of methods, tasks and the budget")
    parser.add_argument("out", type=Path, help="folder for trials, results.json and table.md")
    parser.add_argument("--data", type=Path, help="folder of real tasks: TASK/{train,validation,test}.jsonl")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change a value of the list")
    parser.add_argument("--only", action="append", metavar="NAME", help="run and print this method alone; repeatable")
    parser.add_argument("--smoke", action="store_true", help="apply the list's own smoke block")
    parser.add_argument("--quiet", action="store_true", help="show no progress")
    return parser.parse_args(given)


def compare(spec: CompareSpec, out: Path, data: Path | None = None, *, quiet: bool = False) -> list[dict[str, Any]]:
    """Run every trial that is not there yet; return a row of results for each method, the base's first.

    Args:
        spec: of the comparison.
        out: folder of the results.
        data: folder of the real tasks.
        quiet: show no progress.

    Raises:
        SpecError: a method's spec is wrong.
        MissingError, DataError: of the real tasks.
    """
    from benchmarks.adapters.trial import Trials

    tasks = write_tasks(spec, data, out / "data", spec.training.get("batch_size", 8))
    trials = Trials(spec, tasks, out / "data" / LONGEST, out)
    trials.check()
    rows: list[dict[str, Any]] = [{"name": BASE, "scores": {t.name: [trials.base(t).right] for t in tasks}}]
    with track("comparing", len(spec.methods), unit="methods", quiet=quiet) as progress:
        for method in spec.methods:
            progress.note(method.name)
            rows.append(_row(spec, trials, method))
            progress.advance()
    return rows


def _row(spec: CompareSpec, trials: Trials, method: Contender) -> dict[str, Any]:
    """Choose a method's rate, and train it with every seed."""
    rates: Sequence[float] = method.rates or spec.rates
    losses: dict[float, float] = {}
    tuning = [task for task in trials.tasks if task.name in spec.tuned_on]
    for rate in rates if len(rates) > 1 else ():
        scores = _scores(trials.scores(method, tuning, rate, spec.seeds[0]))
        losses[rate] = fmean(scores[task.name]["validation"][1] for task in tuning)
    rate = min(losses, key=lambda r: losses[r]) if losses else rates[0]
    trials.rates[method.name] = rate
    runs = [trials.scores(method, trials.tasks, rate, seed) for seed in spec.seeds]
    return {
        "name": method.name,
        "group": method.group,
        "trainable_parameters": runs[0][0]["trainable_parameters"],
        "peak_bytes": trials.memory(method, rate),
        "cpu_seconds": fmean(sum(training["cpu_seconds"] for training in run) for run in runs),
        "rate": rate,
        "validation_losses": losses,
        "scores": {task.name: [_scores(run)[task.name]["test"][0] for run in runs] for task in trials.tasks},
    }


def _scores(trainings: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return {name: score for training in trainings for name, score in training["scores"].items()}


def tables(spec: CompareSpec, rows: Sequence[dict[str, Any]]) -> list[Table]:
    """Return a table for each group of methods, the base's row in each."""
    base, *others = rows
    names = [*spec.skills, *spec.tasks]
    means = [label for label, some in (("skills", spec.skills), ("tasks", spec.tasks)) if len(some) > 1]
    columns = ("method", "trained", "memory", "CPU s", "rate", *names, *(f"mean of {label}" for label in means))
    found = []
    for group in dict.fromkeys(row["group"] for row in others):
        shown = [base, *(row for row in others if row["group"] == group)]
        found.append(Table(columns, [_cells(spec, row, names, means) for row in shown], group))
    return found


def _cells(spec: CompareSpec, row: dict[str, Any], names: Sequence[str], means: Sequence[str]) -> list[Cell]:
    score = {name: fmean(row["scores"][name]) for name in names}
    memory, rate = row.get("peak_bytes"), row.get("rate")
    cells: list[Cell] = [row["name"], row.get("trainable_parameters"), memory and human_bytes(memory)]
    cells += [row.get("cpu_seconds"), rate and f"{rate:g}", *score.values()]
    return cells + [fmean(score[name] for name in getattr(spec, label)) for label in means]


def run(options: argparse.Namespace) -> list[Table]:
    """Run a comparison, write and print it."""
    spec = specs.load(options.spec, CompareSpec, overrides=options.set, smoke=options.smoke)
    if options.only:
        spec = spec.model_copy(update={"methods": tuple(m for m in spec.methods if m.name in options.only)})
    options.out.mkdir(parents=True, exist_ok=True)
    rows = compare(spec, options.out, options.data, quiet=options.quiet)
    made = tables(spec, rows)
    record = {"benchmark": "adapters", "machine": machine(), "versions": versions("torch", "transformers", "peft")}
    write_text(options.out / "results.json", json.dumps({**record, "spec": spec.model_dump(), "rows": rows}, indent=1))
    text = "\n\n".join(f"{table.title}\n\n{table.to_markdown()}".strip() for table in made)
    write_text(options.out / "table.md", text + "\n")
    print(text)
    return made


def main(given: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    warnings.filterwarnings("ignore", message="Unsupported layer type", category=UserWarning)  # PEFT's, of norms
    try:
        run(arguments(given))
    except ToolkitError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
