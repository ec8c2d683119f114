"""What a search found, as numbers, as tables and as the merge spec that gives it again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from toolkit.jobs.search.methods import Evaluation, best_of, score_of
from toolkit.jobs.search.setup import Setup, Tasks
from toolkit.tables import Cell, Table


@dataclass(frozen=True)
class Found:
    """What a search found.

    Attributes:
        setup: of the search.
        done: what was measured, the merge as given first.
        rows: scores by task of every row of the table.
        tasks: of the table.
        apart: whether these are of data that the search did not see.
    """

    setup: Setup
    done: Sequence[Evaluation]
    rows: Mapping[str, Mapping[str, float]]
    tasks: Tasks
    apart: bool

    @property
    def best(self) -> Evaluation:
        """The best candidate."""
        return best_of(self.done)

    def numbers(self) -> dict[str, Any]:
        """Return what JSON holds of it."""
        space, first, best = self.setup.space, self.done[0], self.best
        return {
            "method": self.setup.spec.search.method,
            "evaluations": len(self.done),
            "failed": sum(bool(evaluation.error) for evaluation in self.done),
            "start": space.named(space.start),
            "best": space.named(best.values),
            "tuning": {
                "untuned": {"score": first.score, "scores": dict(first.scores)},
                "tuned": {"score": best.score, "scores": dict(best.scores)},
            },
            "data": "test" if self.apart else "tuning",
            "scores": {label: dict(scores) for label, scores in self.rows.items()},
        }

    def tables(self) -> list[Table]:
        """Return the scores, and the free numbers."""
        tasks, free = self.tasks, self.setup.space.free
        by_loss = {name for name, task in tasks.items() if task.metric == "perplexity"}
        columns = ["model", *(f"{name} (perplexity)" if name in by_loss else name for name in tasks), "score"]
        rows: list[list[Cell]] = [
            [label, *(scores[task] for task in tasks), score_of(scores, tasks)] for label, scores in self.rows.items()
        ]
        title = "test data" if self.apart else "tuning data"
        numbers: list[list[Cell]] = [
            [f.path, f.bounds.low, f.bounds.high, f.start, value]
            for f, value in zip(free, self.best.values, strict=True)
        ]
        names = ("parameter", "low", "high", "start", "best")
        return [
            Table(columns, rows, title, 2 if by_loss else 1),
            Table(names, numbers, f"the best of {len(self.done)} candidates", 4),
        ]

    def yaml(self) -> str:
        """Return the best merge as a spec that `toolkit merge` runs."""
        head = f"# The best of {len(self.done)} candidates of a search by {self.setup.spec.search.method}.\n"
        spec = self.setup.space.spec(self.best.values)
        return head + yaml.safe_dump(spec, sort_keys=False, allow_unicode=True)
