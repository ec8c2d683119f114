"""How good a router's choices are: against the known experts, and by what the chosen experts' answers are worth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from toolkit.errors import DataError
from toolkit.routing.curves import Curve, calibration_error, curve
from toolkit.routing.examples import Examples
from toolkit.routing.ops import log_softmax
from toolkit.tables import Cell, Report, Table

SHARES = np.linspace(0, 1, 11)
"""Shares of strong calls that the table of a curve has."""


@dataclass(frozen=True)
class RouteResult(Report):
    """A judged router; see `judge` and `judge_outcomes` for the numbers.

    Attributes:
        curves: of the router and of what it is compared with, where there are two experts.
    """

    curves: Mapping[str, Curve] = field(default_factory=dict)


def judge(
    experts: Sequence[str],
    labels: NDArray[np.int64],
    chosen: NDArray[np.int64],
    quality: NDArray[np.float64] | None = None,
    scores: NDArray[np.floating] | None = None,
    temperature: float = 1.0,
) -> RouteResult:
    """Compare a router's choices with the right ones, and with what other ways of choosing would reach.

    Args:
        experts: their names; the base, where there is one, is called `base`.
        labels: `[B]`, the expert that each prompt was made for.
        chosen: `[B]`, the expert that the router chose.
        quality: `[B, N]`, what each expert's answer to each prompt is worth, such as 1 for a right one.
        scores: `[B, M]`, the router's, of the first `M` experts.
        temperature: by which scores are divided to make shares of them.

    Returns:
        `accuracy` in percent; `confusion[i][j]`, prompts for expert `i` that went to `j`; `calibration_error`, how far
        the best expert's share is from how often it is right; and `quality` in percent of the router, of the expert
        each prompt was made for, of always taking the base or the best single expert, of a random choice among the
        experts, and of the per-prompt oracle.
    """
    confusion = _confusion(experts, labels, chosen)
    accuracy = 100 * float((labels == chosen).mean())
    numbers: dict[str, Any] = {"accuracy": accuracy, "prompts": len(labels), "confusion": _named(experts, confusion)}
    if scores is not None:
        sure = np.exp(log_softmax(scores / temperature).max(axis=1))
        numbers["calibration_error"] = calibration_error(sure, (scores.argmax(axis=1) == labels).astype(float))
    asked = [i for i in range(len(experts)) if confusion[i].any()]
    rows = [[experts[i], *map(int, confusion[i]), 100 * confusion[i, i] / confusion[i].sum()] for i in asked]
    tables = [Table(("made for", *experts, "right, percent"), rows, f"chosen experts; accuracy {accuracy:.1f} percent")]
    if quality is not None:
        reached = _reached(experts, labels, chosen, quality)
        numbers["quality"] = reached
        tables.append(Table(("chosen by", "quality, percent"), list(map(list, reached.items())), "quality"))
    return RouteResult(numbers, tables)


@dataclass(frozen=True)
class Judged:
    """A way to choose, for `judge_outcomes`.

    Attributes:
        chosen: `[B]`, or none where it only orders requests.
        gap: `[B]`, by which requests go to the strong of two experts; none where it orders nothing.
    """

    chosen: NDArray[np.int64] | None = None
    gap: NDArray[np.floating] | None = None


def complete(examples: Examples) -> Examples:
    """Return the prompts that every expert was asked.

    Raises:
        DataError: there are none.
    """
    rows = np.flatnonzero(np.isfinite(examples.quality).all(axis=1))
    if not rows.size:
        raise DataError("no prompt has a score of every expert, so choices cannot be compared")
    return examples.take(rows)


def weak_strong(examples: Examples) -> tuple[int, int] | None:
    """Return the places of the cheaper and the dearer of two experts; of equal costs, of the worse and the better."""
    if len(examples.experts) != 2:
        return None
    order = sorted(range(2), key=lambda i: (examples.costs[i], np.nanmean(examples.quality[:, i])))
    return order[0], order[1]


def baselines(examples: Examples, domains: Mapping[str, list[float]]) -> dict[str, Judged]:
    """Return the ways to choose that every router is shown beside.

    Args:
        examples: what is judged on, complete.
        domains: category -> mean quality of each expert on the prompts of the fit.
    """
    count, pair = len(examples), weak_strong(examples)
    quality = examples.quality
    flat = np.zeros(count)
    found = {"random": Judged(gap=flat), "prompt length": Judged(gap=np.array([len(p) for p in examples.prompts]))}
    found["best single"] = Judged(chosen=np.full(count, int(quality.mean(axis=0).argmax())))
    if domains and any(examples.categories):
        unknown = np.mean(list(domains.values()), axis=0)
        means = np.array([domains.get(name, unknown) for name in examples.categories])
        found["domain mean"] = Judged(means.argmax(axis=1), _gap(means, pair))
    found["oracle"] = Judged(examples.labels, _gap(quality, pair))
    return found if pair else {name: one for name, one in found.items() if name != "prompt length"}


def judge_outcomes(
    examples: Examples,
    scores: NDArray[np.floating],
    chosen: NDArray[np.int64],
    domains: Mapping[str, list[float]],
    *,
    predicts: bool = False,
) -> RouteResult:
    """Judge choices by measured answers, beside other ways to choose.

    Args:
        examples: prompts with every expert's quality.
        scores: `[B, N]`, the router's.
        chosen: `[B]`, what its policy chose; -1 where the fallback is none of the experts.
        domains: category -> mean quality of each expert on the prompts of the fit.
        predicts: whether scores predict the quality.

    Returns:
        `quality`, `cost` and `regret` (the oracle's quality less the router's) per request; `accuracy`, how often no
        expert would have been better, in percent; `shares` of the requests by expert; `confusion` of the best and the
        chosen; where scores predict the quality, `calibration_error` and `brier`; of two experts `apgr`, `cpt50` and
        `cpt80`; and the same of every other way to choose under `beside`.
    """
    taken = chosen >= 0
    if not taken.all():
        examples, scores, chosen = examples.take(np.flatnonzero(taken)), scores[taken], chosen[taken]
    pair = weak_strong(examples)
    ways = {"router": Judged(chosen, _gap(scores, pair)), **baselines(examples, domains)}
    found = {name: measure(examples, way) for name, way in ways.items()}
    confusion = _confusion(examples.experts, examples.labels, chosen)
    numbers: dict[str, Any] = {**found["router"], "prompts": len(examples), "fallbacks": int((~taken).sum())}
    numbers["shares"] = dict(zip(examples.experts, (confusion.sum(axis=0) / len(examples)).tolist(), strict=True))
    numbers["confusion"] = _named(examples.experts, confusion)
    if predicts:
        numbers["calibration_error"] = calibration_error(scores.ravel(), examples.quality.ravel())
        numbers["brier"] = float(np.square(scores - examples.quality).mean())
    numbers["beside"] = {name: one for name, one in found.items() if name != "router"}
    drawn = {name: _curve(examples, way.gap, pair) for name, way in ways.items() if way.gap is not None and pair}
    tables = [outcome_table(found, bool(pair)), _confusion_table(examples.experts, confusion)]
    return RouteResult(numbers, [*tables, *([_curve_table(drawn)] if drawn else [])], drawn)


def measure(examples: Examples, way: Judged) -> dict[str, float]:
    """Return the numbers of one way to choose; only those that it has."""
    found: dict[str, float] = {}
    rows, best = np.arange(len(examples)), examples.quality.max(axis=1)
    if way.chosen is not None:
        reached = examples.quality[rows, way.chosen]
        found["quality"] = float(reached.mean())
        found["regret"] = float((best - reached).mean())
        found["accuracy"] = 100 * float((reached == best).mean())
        found["cost"] = float(examples.costs[way.chosen].mean())
    pair = weak_strong(examples)
    if way.gap is not None and pair:
        drawn = _curve(examples, way.gap, pair)
        found |= {"apgr": drawn.apgr(), "cpt50": drawn.cpt(0.5), "cpt80": drawn.cpt(0.8)}
    return {name: value for name, value in found.items() if np.isfinite(value)}


def outcome_table(found: Mapping[str, Mapping[str, float]], pair: bool, title: str = "quality per request") -> Table:
    """Return one line per way to choose; with `pair`, the measures of two experts first."""
    columns = ["apgr", "cpt50", "cpt80"] if pair else []
    columns += ["quality", "regret", "accuracy", "cost"]
    rows: list[list[Cell]] = [[name, *(numbers.get(column) for column in columns)] for name, numbers in found.items()]
    return Table(("chosen by", *columns), rows, title, digits=3)


def _curve_table(curves: Mapping[str, Curve]) -> Table:
    rows: list[list[Cell]] = [[100 * float(s), *(one.at(float(s)) for one in curves.values())] for s in SHARES]
    return Table(("strong, percent", *curves), rows, "quality by the share of strong calls", digits=3)


def _curve(examples: Examples, gap: NDArray[np.floating], pair: tuple[int, int]) -> Curve:
    weak, strong = pair
    return curve(gap, examples.quality[:, weak], examples.quality[:, strong])


def _gap(scores: NDArray[np.floating], pair: tuple[int, int] | None) -> NDArray[np.floating] | None:
    return None if pair is None else scores[:, pair[1]] - scores[:, pair[0]]


def _confusion(experts: Sequence[str], labels: NDArray[np.int64], chosen: NDArray[np.int64]) -> NDArray[np.int64]:
    confusion = np.zeros((len(experts), len(experts)), np.int64)
    np.add.at(confusion, (labels, chosen), 1)
    return confusion


def _named(experts: Sequence[str], confusion: NDArray[np.int64]) -> dict[str, dict[str, int]]:
    return {name: dict(zip(experts, map(int, row), strict=True)) for name, row in zip(experts, confusion, strict=True)}


def _confusion_table(experts: Sequence[str], confusion: NDArray[np.int64]) -> Table:
    rows: list[list[Cell]] = [[name, *map(int, row)] for name, row in zip(experts, confusion, strict=True)]
    return Table(("best", *experts), rows, "chosen experts; of equally good ones the cheapest counts as the best")


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
