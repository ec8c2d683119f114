"""Search the coefficients of a merge: measure candidates on tasks, keep the best as a plain merge spec.

Candidates are exactly the merges that `toolkit merge` would write. Work goes on in a hidden sibling of the output,
whose journal lets a search that was stopped go on to the result that it would have had.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolkit import specs
from toolkit.checkpoints.writer import check_free, commit, locked, staging_path, write_text
from toolkit.errors import Problem, RequestError, UnsupportedError
from toolkit.jobs.search.history import History
from toolkit.jobs.search.methods import Evaluation, best_of, propose, run, score_of
from toolkit.jobs.search.report import Found
from toolkit.jobs.search.setup import Setup, Tasks, hold_out, set_up
from toolkit.jobs.search.space import Values
from toolkit.jobs.search.spec import SearchSpec
from toolkit.merge.run import merge
from toolkit.progress import track
from toolkit.tables import Report

if TYPE_CHECKING:
    from toolkit.jobs.search.judge import Judge

BEST, MERGED, DATA = "best.yaml", "merged", "data"
"""What a search writes besides its history and its results: the spec, the merge, rows that were held out."""


@dataclass(frozen=True)
class SearchResult(Report):
    """A finished search.

    Attributes:
        path: folder that was written.
        best: the free numbers of the best merge, by key path.
    """

    path: Path = Path()
    best: Mapping[str, float] = field(default_factory=dict)


def search(
    spec: specs.Source | SearchSpec,
    out: str | Path | None = None,
    *,
    overrides: Sequence[str] = (),
    smoke: bool = False,
    resume: bool = False,
    overwrite: bool = False,
    quiet: bool = False,
) -> SearchResult:
    """Search the coefficients of a merge and write the best one.

    Args:
        spec: a YAML file, a dict or a `SearchSpec`.
        out: folder to write, instead of the spec's own; it appears only when it is whole.
        overrides: `key.path=value` changes to the spec.
        smoke: apply the spec's own `smoke:` block.
        resume: go on with a search into `out` that was stopped.
        overwrite: replace `out` if it exists.
        quiet: show no progress.

    Raises:
        SpecError: everything that is wrong with the search and with its merge, before anything is measured.
        MissingError: no such data file.
        DataError: a row without an answer, or one too long for a model.
        OutputError: `out` exists, or what is to be resumed is another search.
    """
    loaded = specs.load(spec, SearchSpec, overrides=overrides, smoke=smoke)
    if not (out or loaded.out):
        raise loaded.error([Problem("out", "required: the folder to write")])
    folder = Path(os.path.expanduser(out or loaded.out or ""))
    check_free(folder, overwrite=overwrite)
    setup = set_up(loaded)
    with locked(staging_path(folder)) as partial:
        history = History(partial, setup.fingerprint, resume=resume)
        try:
            result = _Search(setup, history, partial, quiet).run(folder)
            commit(partial, folder)
        finally:
            history.close()
            if partial.exists() and history.is_empty:
                shutil.rmtree(partial)  # nothing in it that could be resumed
    return result


class _Search:
    """One search under way; everything that it measures goes through its history."""

    def __init__(self, setup: Setup, history: History, folder: Path, quiet: bool) -> None:
        from toolkit.jobs.search.judge import Judge

        self.setup, self.history, self.folder, self.quiet = setup, history, folder, quiet
        self.tuning, self.test = hold_out(setup.spec, folder / DATA)
        self.judge: Judge = Judge(setup, folder)

    def run(self, out: Path) -> SearchResult:
        """Measure the inputs, then candidates, then the best on other data; write all of it."""
        space, table = self.setup.space, self.test or self.tuning
        rows = self._inputs(table)
        if self.test:
            rows["untuned merge"] = self._row("untuned merge", space.start)
        done = self._candidates()
        best = best_of(done)
        if self.test:
            rows["tuned merge"] = self._row("tuned merge", best.values)
        else:
            rows |= {"untuned merge": done[0].scores, "tuned merge": best.scores}
        found = Found(self.setup, done, rows, table, bool(self.test))
        numbers = {"path": str(out), **found.numbers()}
        result = SearchResult(numbers, found.tables(), out, space.named(best.values))
        self._write(found, result)
        return result

    def _inputs(self, tasks: Tasks) -> dict[str, Mapping[str, float]]:
        named = {"base": self.setup.base} if self.setup.base else {}
        models = {**named, **self.setup.inputs}
        rows: dict[str, Mapping[str, float]] = {}
        with track("measuring the inputs", len(models), unit="models", quiet=self.quiet) as progress:
            for label, model in models.items():
                found = self.history.step({"row": label}, lambda m=model: {"scores": self.judge.model(m, tasks)})
                rows[label] = found["scores"]
                progress.advance()
        return rows

    def _row(self, label: str, values: Values) -> Mapping[str, float]:
        spec = self.setup.space.spec(values)
        return self.history.step({"row": label}, lambda: {"scores": self.judge.merge(spec, self.test)})["scores"]

    def _candidates(self) -> list[Evaluation]:
        space, options = self.setup.space, self.setup.spec.search
        highest = 0.0
        with track("searching", self.setup.budget, unit="candidates", quiet=self.quiet) as progress:

            def measure(values: Values) -> Evaluation:
                nonlocal highest
                found = self.history.step({"values": space.named(values)}, lambda: self._try(values))
                highest = max(highest, found["score"])
                progress.note(f"best {highest:.1f}")
                progress.advance()
                return Evaluation(values, found["score"], found["scores"], found.get("error", ""))

            return run(space.start, propose(options, space), self.setup.budget, measure)

    def _try(self, values: Values) -> dict[str, Any]:
        """Measure a candidate; one whose weights are beyond all measure scores 0, unless it is the start."""
        try:
            scores = self.judge.merge(self.setup.space.spec(values), self.tuning)
        except (RequestError, UnsupportedError, OverflowError) as error:
            if values == self.setup.space.start:
                raise
            return {"score": 0.0, "scores": {}, "error": str(error)}
        return {"score": score_of(scores, self.tuning), "scores": scores}

    def _write(self, found: Found, result: SearchResult) -> None:
        write_text(self.folder / BEST, found.yaml())
        write_text(self.folder / "results.json", json.dumps(result.to_dict(), indent=2) + "\n")
        write_text(self.folder / "results.md", "\n\n".join(t.to_markdown() for t in result.tables) + "\n")
        if self.setup.spec.merged:
            merge(self.folder / BEST, self.folder / MERGED, overwrite=True, quiet=self.quiet)
