"""Compare routers on measured answers: fit each on a part of the rows, judge it on the rest, several times."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from toolkit import specs
from toolkit.checkpoints.writer import check_free, staged, write_text
from toolkit.errors import Problem, SpecError, UnsupportedError
from toolkit.progress import track
from toolkit.routing.embedding import Embedder, EmbeddingSpec, open_embedder
from toolkit.routing.evaluate import Judged, baselines, complete, measure, weak_strong
from toolkit.routing.examples import Examples, read_outcomes
from toolkit.routing.features import BATCH, Features
from toolkit.routing.fit import fitted, parameters
from toolkit.routing.ops import Vectors
from toolkit.routing.router import kind_module
from toolkit.routing.spec import CompareSpec
from toolkit.tables import Cell, Report, Table

COLUMNS = ("apgr", "cpt50", "cpt80", "quality", "regret")


@dataclass(frozen=True)
class Comparison(Report):
    """Routers by name, each with its numbers by seed."""


def compare_routers(
    spec: specs.Source | CompareSpec,
    out: str | Path | None = None,
    *,
    overrides: Sequence[str] = (),
    smoke: bool = False,
    overwrite: bool = False,
    quiet: bool = False,
    embedders: Mapping[str, Embedder] | None = None,
) -> Comparison:
    """Fit and judge routers as a spec says.

    What is learned (words, scales, parameters that a router chooses itself) is learned on the part of the rows that a
    router is fitted on; only an embedding, which is not learned here, is computed once.

    Args:
        spec: a YAML file, a dict or a `CompareSpec`.
        out: folder to write `results.json` and `results.md` in, instead of the spec's own.
        overrides: `key.path=value` changes to the spec.
        smoke: apply the spec's own `smoke:` block.
        overwrite: replace `out` if it exists.
        quiet: show no progress.
        embedders: embeddings of some of the features, by name, when they are loaded already; see `embedded`.

    Raises:
        SpecError: the spec is wrong.
        DataError: a row without a prompt or a score, or no row that has a score of every expert.
        OutputError: `out` exists.
    """
    loaded = specs.load(spec, CompareSpec, overrides=overrides, smoke=smoke)
    folder = out or loaded.out
    if folder:
        check_free(Path(folder), overwrite=overwrite)
    kinds = _candidates(loaded)
    examples = complete(read_outcomes(loaded.outcomes))
    seen_by = dict(embedders or {})
    for name, block in loaded.features.items():
        if block.embedding is not None and name not in seen_by:
            seen_by[name] = embedded(block.embedding, examples.prompts, quiet=quiet)
    found: dict[str, list[dict[str, float]]] = {}
    total = len(loaded.seeds) * len(kinds)
    with track("fitting routers", total, unit="fits", quiet=quiet) as progress:
        for train, test in splits(examples, loaded):
            for name, way in baselines(test, train.category_means()).items():
                found.setdefault(name, []).append(measure(test, way))
            vectors: dict[str, tuple[Features, Any]] = {}
            for name, (kind, params, seen) in kinds.items():
                if seen not in vectors:
                    features = Features(loaded.features[seen], embedder=seen_by.get(seen))
                    vectors[seen] = features, features.fit(train.prompts, quiet=True)
                scores = fitted(kind, params, *vectors[seen], train).score(test.prompts)
                found.setdefault(name, []).append(measure(test, _way(test, scores)))
                progress.advance()
    result = Comparison({"prompts": len(examples), "routers": found}, [_table(found, loaded)])
    if folder:
        with staged(Path(folder), overwrite=overwrite) as partial:
            write_text(partial / "results.json", json.dumps(result.to_dict(), indent=2) + "\n")
            write_text(partial / "results.md", result.tables[0].to_markdown() + "\n")
    return result


def splits(examples: Examples, spec: CompareSpec) -> Iterator[tuple[Examples, Examples]]:
    """Yield the rows to fit on and the rows to judge on, for each seed.

    Raises:
        SpecError: one of the parts would be empty.
    """
    names = np.array(examples.categories)
    units = np.arange(len(examples)) if spec.split == "rows" else np.unique(names)
    count = int(spec.train * len(units))
    if count in (0, len(units)):
        raise spec.error([Problem("train", f"{spec.train} of {len(units)} {spec.split} leaves one part empty")])
    for seed in spec.seeds:
        order = np.random.default_rng(seed).permutation(len(units))
        if spec.split == "rows":
            train, test = order[:count], order[count:]
        else:
            known = np.isin(names, units[order[:count]])
            train, test = np.flatnonzero(known), np.flatnonzero(~known)
        yield examples.take(train), examples.take(test)


def _candidates(spec: CompareSpec) -> dict[str, tuple[str, Any, str]]:
    """Return kind, checked parameters and features of every router."""
    found, problems = {}, []
    for name, candidate in spec.routers.items():
        try:
            params = parameters(kind_module(candidate.router), candidate.parameters, f"routers.{name}.parameters")
            found[name] = candidate.router, params, candidate.features
        except UnsupportedError as error:
            problems.append(Problem(f"routers.{name}.router", str(error)))
        except SpecError as error:
            problems += error.problems
    if problems:
        raise spec.error(problems)
    return found


def _way(test: Examples, scores: Vectors) -> Judged:
    pair = weak_strong(test)
    gap = None if pair is None else scores[:, pair[1]] - scores[:, pair[0]]
    return Judged(scores.argmax(axis=1), gap)


def embedded(spec: EmbeddingSpec, prompts: Sequence[str], *, quiet: bool = False) -> Embedder:
    """Embed all prompts once; return what looks them up."""
    embed = open_embedder(spec)
    different = sorted(set(prompts))
    places = {text: at for at, text in enumerate(different)}
    vectors: list[Vectors] = []
    with track("embedding prompts", len(different), unit="prompts", quiet=quiet) as progress:
        for first in range(0, len(different), BATCH):
            vectors.append(embed(different[first : first + BATCH]))
            progress.advance(len(vectors[-1]))
    table: NDArray[np.float32] = np.concatenate(vectors)
    return lambda texts: table[[places[text] for text in texts]]


def _table(found: Mapping[str, Sequence[Mapping[str, float]]], spec: CompareSpec) -> Table:
    shown = [column for column in COLUMNS if any(column in numbers for one in found.values() for numbers in one)]
    rows: list[list[Cell]] = []
    for name, several in found.items():
        row: list[Cell] = [name, *(_mean(several, column) for column in shown)]
        spread = [numbers["apgr"] for numbers in several if "apgr" in numbers]
        rows.append([*row, float(np.std(spread)) if spread and "apgr" in shown else None])
    title = f"mean of {len(spec.seeds)} splits by {spec.split}, {spec.train:g} to fit on"
    return Table(("chosen by", *shown, "deviation of apgr"), rows, title, digits=3)


def _mean(several: Sequence[Mapping[str, float]], column: str) -> float | None:
    values = [numbers[column] for numbers in several if column in numbers]
    return float(np.mean(values)) if values else None
