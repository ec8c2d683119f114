"""What routers learn from: prompts, and what each expert's answer to them is worth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from toolkit.data.rows import Row, read_rows, user_text
from toolkit.errors import DataError
from toolkit.names import did_you_mean
from toolkit.routing.spec import ExpertSpec, OutcomesSpec

BOOLEANS = {"true": 1, "false": 0}
"""How CSV files say whether an answer was right."""


@dataclass(frozen=True)
class Examples:
    """Prompts with the worth of every expert's answer.

    Attributes:
        experts: names, in the order of the columns.
        prompts: `B` texts.
        quality: `[B, N]` float64, NaN where nobody asked the expert; of prompts that were made for one expert, 1 for
            that one and 0 for the others.
        cost: `[B, N]` float64 of each answer, in any unit; NaN where unknown.
        categories: of each prompt, such as a subject; the expert where prompts were made for one.
        labelled: whether prompts were made for an expert, rather than every expert's answers measured.
    """

    experts: tuple[str, ...]
    prompts: list[str]
    quality: NDArray[np.float64]
    cost: NDArray[np.float64]
    categories: list[str]
    labelled: bool

    def __len__(self) -> int:
        return len(self.prompts)

    @cached_property
    def costs(self) -> NDArray[np.float64]:
        """Mean cost of each expert, `[N]`; 0 where unknown."""
        known = np.isfinite(self.cost)
        return np.where(known, self.cost, 0).sum(axis=0) / np.maximum(known.sum(axis=0), 1)

    @cached_property
    def labels(self) -> NDArray[np.int64]:
        """The best expert for each prompt, `[B]`; of equals the one that is cheapest on average."""
        order = np.argsort(self.costs, kind="stable")
        quality = np.where(np.isnan(self.quality), -np.inf, self.quality)
        return order[quality[:, order].argmax(axis=1)]

    def members(self) -> list[NDArray[np.int64]]:
        """Return, for each expert, the rows for which it is the best.

        Raises:
            DataError: there are none for one of them.
        """
        found = [np.flatnonzero(self.labels == i) for i in range(len(self.experts))]
        for name, rows in zip(self.experts, found, strict=True):
            if not len(rows):
                raise DataError(f"{name} is the best expert on no row, and this router learns from such rows alone")
        return found

    def take(self, rows: NDArray[Any]) -> Examples:
        """Return some of the rows."""
        texts, names = [self.prompts[i] for i in rows], [self.categories[i] for i in rows]
        return Examples(self.experts, texts, self.quality[rows], self.cost[rows], names, self.labelled)

    def of_categories(self) -> Examples:
        """Return the same prompts with their categories as the experts, for learning to tell those apart."""
        names = tuple(sorted(set(self.categories)))
        places = np.array([names.index(name) for name in self.categories])
        return labelled(names, self.prompts, places)

    def category_means(self) -> dict[str, list[float]]:
        """Return the mean quality of every expert by category; 0 for an expert that was not asked there."""
        names = np.array(self.categories)
        known = np.isfinite(self.quality)
        found = {}
        for name in sorted(set(self.categories)):
            rows = names == name
            total = np.where(known, self.quality, 0)[rows].sum(axis=0)
            found[name] = (total / np.maximum(known[rows].sum(axis=0), 1)).tolist()
        return found


def labelled(experts: Sequence[str], prompts: Sequence[str], places: NDArray[np.int64]) -> Examples:
    """Make examples of prompts that were made for one expert each, `places[i]` among `experts`."""
    quality = np.eye(len(experts))[places]
    categories = [experts[int(i)] for i in places]
    return Examples(tuple(experts), list(prompts), quality, np.full(quality.shape, np.nan), categories, True)


def read_labelled(experts: dict[str, ExpertSpec]) -> Examples:
    """Read prompts that were made for experts.

    Raises:
        DataError: a row without a prompt.
    """
    prompts: list[str] = []
    places: list[int] = []
    for index, expert in enumerate(experts.values()):
        rows = read_rows(expert.data)[: expert.limit]
        prompts += [user_text(row) for row in rows]
        places += [index] * len(rows)
    return labelled(list(experts), prompts, np.array(places))


def read_outcomes(spec: OutcomesSpec) -> Examples:
    """Read what experts' answers are worth, from rows of one answer each or of one prompt each.

    Raises:
        DataError: a row without what the spec says it has, a score that is no number, or one that is given twice.
    """
    rows = read_rows(spec.data)
    cells = _wide(rows, spec) if spec.scores else _long(rows, spec)
    queries: dict[str, int] = {}
    experts: dict[str, int] = {name: i for i, name in enumerate(spec.scores)}
    texts: list[str] = []
    categories: list[str] = []
    for cell in cells:
        if cell.query not in queries:
            queries[cell.query] = len(queries)
            texts.append(cell.text)
            categories.append(cell.category)
        experts.setdefault(cell.expert, len(experts))
    quality = np.full((len(queries), len(experts)), np.nan)
    cost = quality.copy()
    for cell in cells:
        at = queries[cell.query], experts[cell.expert]
        if np.isfinite(quality[at]):
            raise DataError(f"{cell.place}: a second score of {cell.expert} for the query {cell.query}")
        quality[at] = cell.score
        cost[at] = spec.costs.get(cell.expert, np.nan) if cell.cost is None else cell.cost
    kept = np.arange(len(texts))[: spec.limit]
    return Examples(tuple(experts), texts, quality, cost, categories, False).take(kept)


@dataclass(frozen=True)
class _Cell:
    """The score of one answer."""

    query: str
    text: str
    expert: str
    score: float
    cost: float | None
    category: str
    place: str


def _wide(rows: Sequence[Row], spec: OutcomesSpec) -> list[_Cell]:
    return [
        _Cell(str(number), _text(row), name, _number(row, field), None, _category(row, spec), row.place)
        for number, row in enumerate(rows)
        for name, field in spec.scores.items()
    ]


def _long(rows: Sequence[Row], spec: OutcomesSpec) -> list[_Cell]:
    cells = []
    for row in rows:
        query, expert = _field(row, "query_id"), _field(row, "model")
        cost = _number(row, "cost") if "cost" in row.data else None
        score = _number(row, "score")
        cells.append(_Cell(str(query), _text(row), str(expert), score, cost, _category(row, spec), row.place))
    return cells


def _text(row: Row) -> str:
    return row.data["query"] if isinstance(row.data.get("query"), str) else user_text(row)


def _category(row: Row, spec: OutcomesSpec) -> str:
    return str(_field(row, spec.category)) if spec.category else ""


def _field(row: Row, name: str) -> Any:
    if name not in row.data:
        raise DataError(f"{row.place}: no field {name!r}{did_you_mean(name, row.data)}")
    return row.data[name]


def _number(row: Row, name: str) -> float:
    value = _field(row, name)
    try:
        number = float(BOOLEANS.get(value.lower(), value) if isinstance(value, str) else value)
    except (TypeError, ValueError):
        number = np.nan
    if not np.isfinite(number):
        raise DataError(f"{row.place}: {name}: expected a number, got {value!r}")
    return number
