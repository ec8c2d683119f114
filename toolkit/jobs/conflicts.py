"""Show compared deltas: numbers for a script, tables for a reader."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from math import isfinite
from typing import Any

import numpy as np
from numpy.typing import NDArray

from toolkit.merge.conflicts import Comparison, Sums
from toolkit.tables import Cell, Table

NAMED = 4
"""Models up to which the table of layers has a column for each."""

PAIRS = 10
"""Pairs that the table of pairs shows."""


def numbers_of(comparison: Comparison) -> dict[str, Any]:
    """Return all that was measured, for JSON; what is not defined, such as a norm relative to zero, is `None`.

    Matrices have the order of `models`.
    """
    return {
        "base": comparison.base,
        "models": list(comparison.models),
        "total": _measures(comparison, comparison.total),
        "layers": {part: _measures(comparison, sums) for part, sums in comparison.layers.items()},
        "tensors": {
            name: {"shape": list(comparison.shapes[name])} | _measures(comparison, sums)
            for name, sums in comparison.tensors.items()
        },
        "not_finite": [
            {"model": found.source, "tensor": found.tensor, "elements": found.elements} for found in comparison.unusable
        ],
    }


def tables_of(comparison: Comparison) -> list[Table]:
    """Return a table of the models, of their pairs, of the layers, and of tensors that hold NaN or infinity."""
    tables = [_models_table(comparison)]
    if len(comparison.models) > 1:
        tables.append(_pairs_table(comparison))
    tables.append(_layers_table(comparison))
    if comparison.unusable:
        rows: list[list[Cell]] = [[found.source, found.tensor, found.elements] for found in comparison.unusable]
        tables.append(Table(("model", "tensor", "elements"), rows, "NaN or infinity (left out above)"))
    return tables


def short_names(names: Sequence[str]) -> list[str]:
    """Return the last parts of paths where they tell all of them apart, else the names themselves."""
    short = [name.rstrip("/").rpartition("/")[2] for name in names]
    return short if len(set(short)) == len(names) else list(names)


def _measures(comparison: Comparison, sums: Sums) -> dict[str, Any]:
    models = comparison.models
    found: dict[str, Any] = {
        "elements": sums.count,
        "norm": dict(zip(models, _plain(sums.norms), strict=True)),
        "relative_norm": dict(zip(models, _plain(sums.relative_norms), strict=True)),
        "changed": dict(zip(models, _plain(np.diagonal(sums.overlap)), strict=True)),
    }
    if len(models) > 1:
        found |= {"cosine": _plain(sums.cosines), "overlap": _plain(sums.overlap)}
        found |= {"conflicts": _plain(sums.conflicts), "clashes": sums.clashes}
    if comparison.ranks:
        shares = (dict(zip(map(str, comparison.ranks), row, strict=True)) for row in _plain(sums.energy))
        found["energy"] = dict(zip(models, shares, strict=True))
    return found


def _plain(values: NDArray[np.float64]) -> list[Any]:
    found = values.astype(object)
    found[~np.isfinite(values)] = None
    return found.tolist()


def _cell(value: float) -> float | None:
    return float(value) if isfinite(value) else None


def _energy_columns(comparison: Comparison) -> list[str]:
    return [f"energy, top {rank}" for rank in comparison.ranks]


def _models_table(comparison: Comparison) -> Table:
    total = comparison.total
    rows = [
        [model, float(norm), _cell(relative), float(changed), *map(_cell, energy)]
        for model, norm, relative, changed, energy in zip(
            comparison.models,
            total.norms,
            total.relative_norms,
            np.diagonal(total.overlap),
            total.energy,
            strict=True,
        )
    ]
    columns = ["model", "norm", "relative norm", "changed share", *_energy_columns(comparison)]
    return Table(columns, rows, f"Deltas from {comparison.base}", 4)


def _pairs_table(comparison: Comparison) -> Table:
    """Show the pairs with the most sign conflicts, and what all models together have."""
    total, names = comparison.total, short_names(comparison.models)
    pairs = sorted(combinations(range(len(names)), 2), key=lambda pair: -total.conflicts[pair])
    rows: list[list[Cell]] = [
        [f"{names[i]}, {names[j]}", *(float(x[i, j]) for x in (total.cosines, total.conflicts, total.overlap))]
        for i, j in pairs[:PAIRS]
    ]
    if len(names) > 2:
        rows.append(["all together", _cell(total.mean_cosine()), total.clashes, total.shared / max(total.count, 1)])
    title = f"Pairs with the most sign conflicts, {PAIRS} of {len(pairs)}" if len(pairs) > PAIRS else "Pairs"
    return Table(("models", "cosine", "sign conflicts", "overlap"), rows, title, 4)


def _layers_table(comparison: Comparison) -> Table:
    names, several = short_names(comparison.models), len(comparison.models) > 1
    each = len(names) <= NAMED
    columns = ["layer", *([f"norm, {name}" for name in names] if each else ["norm, mean", "norm, largest"])]
    columns += ["relative norm", *(["cosine", "sign conflicts"] if several else []), *_energy_columns(comparison)]
    rows: list[list[Cell]] = []
    for part, sums in comparison.layers.items():
        norms = sums.norms if each else np.array([sums.norms.mean(), sums.norms.max()])
        row = [part, *norms.tolist(), _cell(sums.relative_norms.mean())]
        row += [_cell(sums.mean_cosine()), sums.clashes] if several else []
        rows.append([*row, *map(_cell, sums.mean_energy())])
    title = (
        "Layers (relative norm, cosine and energy: means over models; sign conflicts: of all together)"
        if several
        else "Layers"
    )
    return Table(columns, rows, title, 4)
