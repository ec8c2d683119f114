"""Tables and figures of the study, over one or several seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from toolkit.tables import Cell, Table, human_bytes

Rows = Mapping[str, Mapping[str, Any]]
"""Row -> what was measured."""

SHOWN = (
    "zero-shot",
    "weight averaging",
    "task arithmetic",
    "TIES",
    "TSV-M",
    "AdaMerging (layer)",
    "TALL masks",
    "individual",
)
"""Rows of the bar chart."""

MARKERS = "o^sDvP"
"""Of ten rows each, which have the ten colours of matplotlib."""


def spread(values: Sequence[float]) -> str:
    """Write a mean, and where there are several values their standard deviation."""
    return f"{mean(values):.1f}" + (f" ± {stdev(values):.1f}" if len(values) > 1 else "")


def main_table(seeds: Sequence[Rows]) -> Table:
    """Return one line per row: percent right by task, mean, mean share of the individual models', bytes, data."""
    tasks = list(seeds[0]["individual"]["accuracy"])
    lines: list[list[Cell]] = []
    for name, first in seeds[0].items():
        accuracies = [rows[name]["accuracy"] for rows in seeds]
        means = [mean(accuracy.values()) for accuracy in accuracies]
        shares = [share(rows[name], rows["individual"]) for rows in seeds]
        by_task: list[Cell] = [mean(accuracy[task] for accuracy in accuracies) for task in tasks]
        lines.append([name, *by_task, spread(means), spread(shares), human_bytes(first["bytes"]), first["data"]])
    columns = ("method", *tasks, "mean", "of individual, %", "stored", "data besides the fine-tunes'")
    title = f"percent right on the test rows, {len(seeds)} seed{'s' * (len(seeds) > 1)}"
    return Table(columns, lines, title)


def share(row: Mapping[str, Any], individual: Mapping[str, Any]) -> float:
    """Return the mean over tasks of a row's accuracy over the individual model's, in percent."""
    own = individual["accuracy"]
    return 100 * mean(score / own[task] for task, score in row["accuracy"].items())


def shifted_table(seeds: Sequence[Mapping[str, Rows]], clean: Sequence[Rows]) -> Table:
    """Return one line per row: mean percent right on every kind of shifted test rows, and on clean ones."""
    shifts = list(seeds[0])
    lines: list[list[Cell]] = []
    for name, first in seeds[0][shifts[0]].items():
        cells: list[Cell] = [spread([_mean(rows[shift][name]) for rows in seeds]) for shift in shifts]
        own = [_mean(rows[name]) for rows in clean if name in rows]
        lines.append([name, spread(own) if own else None, *cells, first["data"]])
    return Table(("method", "clean", *shifts, "data"), lines, "mean percent right on shifted test rows")


def _mean(row: Mapping[str, Any]) -> float:
    return mean(row["accuracy"].values())


def draw(seeds: Sequence[Rows], folder: Path) -> list[Path]:
    """Draw accuracy by task, and accuracy against bytes, as PNG."""
    from matplotlib.figure import Figure

    bars, points = Figure((12, 4.5), layout="constrained"), Figure((9, 5), layout="constrained")
    _draw_bars(seeds, bars.add_subplot())
    bars.legend(loc="outside upper center", ncols=len(SHOWN), fontsize="small")
    _draw_sizes(seeds, points.add_subplot())
    points.legend(loc="outside right upper", fontsize="small")
    files = [folder / "accuracy_by_task.png", folder / "accuracy_against_bytes.png"]
    for figure, file in zip((bars, points), files, strict=True):
        figure.savefig(file, dpi=150)
    return files


def _draw_bars(seeds: Sequence[Rows], axes: Any) -> None:
    tasks = list(seeds[0]["individual"]["accuracy"])
    shown = [name for name in SHOWN if name in seeds[0]]
    width = 0.85 / len(shown)
    for index, name in enumerate(shown):
        heights = [mean(rows[name]["accuracy"][task] for rows in seeds) for task in tasks]
        axes.bar([place + index * width for place in range(len(tasks))], heights, width, label=name)
    axes.set_xticks([place + 0.4 for place in range(len(tasks))], tasks)
    axes.set_ylabel("percent right")


def _draw_sizes(seeds: Sequence[Rows], axes: Any) -> None:
    for index, (name, first) in enumerate(seeds[0].items()):
        height = mean(_mean(rows[name]) for rows in seeds)
        style = {"marker": MARKERS[index // 10], "color": f"C{index % 10}"}
        axes.plot(first["bytes"] / 1e6, height, linestyle="none", label=name, **style)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter("{x:g}")
    axes.tick_params(axis="x", which="both", labelrotation=45)
    axes.set_xlabel("stored, MB")
    axes.set_ylabel("mean percent right")
