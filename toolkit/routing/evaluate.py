"""How good a router's choices are: against the known experts, and by what the chosen experts' answers are worth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from toolkit.tables import Report, Table


@dataclass(frozen=True)
class RouteResult(Report):
    """A judged router; see `judge` for the numbers."""


def judge(
    experts: Sequence[str],
    labels: NDArray[np.int64],
    chosen: NDArray[np.int64],
    quality: NDArray[np.float64] | None = None,
) -> RouteResult:
    """Compare a router's choices with the right ones, and with what other ways of choosing would reach.

    Args:
        experts: their names; the base, where there is one, is called `base`.
        labels: `[B]`, the expert that each prompt was made for.
        chosen: `[B]`, the expert that the router chose.
        quality: `[B, N]`, what each expert's answer to each prompt is worth, such as 1 for a right one.

    Returns:
        `accuracy` in percent; `confusion[i][j]`, prompts for expert `i` that went to `j`; and `quality` in percent
        of the router, of the expert each prompt was made for, of always taking the base or the best single
        expert, of a random choice among the experts, and of the per-prompt oracle.
    """
    confusion = np.zeros((len(experts), len(experts)), int)
    np.add.at(confusion, (labels, chosen), 1)
    accuracy = 100 * float((labels == chosen).mean())
    numbers = {
        "accuracy": accuracy,
        "prompts": len(labels),
        "confusion": {
            name: dict(zip(experts, map(int, row), strict=True)) for name, row in zip(experts, confusion, strict=True)
        },
    }
    asked = [i for i in range(len(experts)) if confusion[i].any()]
    rows = [[experts[i], *map(int, confusion[i]), 100 * confusion[i, i] / confusion[i].sum()] for i in asked]
    tables = [Table(("made for", *experts, "right, percent"), rows, f"chosen experts; accuracy {accuracy:.1f} percent")]
    if quality is not None:
        reached = _reached(experts, labels, chosen, quality)
        numbers["quality"] = reached
        tables.append(Table(("chosen by", "quality, percent"), list(map(list, reached.items())), "quality"))
    return RouteResult(numbers, tables)


def _reached(
    experts: Sequence[str], labels: NDArray[np.int64], chosen: NDArray[np.int64], quality: NDArray[np.float64]
) -> dict[str, float]:
    rows = np.arange(len(labels))
    means = quality.mean(axis=0)
    single = [i for i, name in enumerate(experts) if name != "base"]
    best = max(single, key=lambda i: means[i])
    found = {"router": quality[rows, chosen].mean(), "own expert": quality[rows, labels].mean()}
    if "base" in experts:
        found["always base"] = means[experts.index("base")]
    found |= {
        f"best single ({experts[best]})": means[best],
        "random": means[single].mean(),
        "oracle": quality.max(axis=1).mean(),
    }
    return {name: 100 * float(value) for name, value in found.items()}
