"""Judge a router by measured answers, or by those of the experts that it chooses; and explain one choice."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from toolkit import specs
from toolkit.checkpoints.writer import check_free, staged, write_text
from toolkit.data.rows import read_rows, split_answer, user_text
from toolkit.errors import DataError, Problem
from toolkit.evaluation.metrics import exact_match
from toolkit.jobs.asking import check_prompt
from toolkit.progress import track
from toolkit.routing.evaluate import RouteResult, complete, judge, judge_outcomes
from toolkit.routing.examples import Examples, read_outcomes
from toolkit.routing.policy import Choice
from toolkit.routing.router import Router, load_router
from toolkit.routing.scope import novelty
from toolkit.routing.spec import RouteEvaluateSpec
from toolkit.serving.engine import BASE, Engine
from toolkit.serving.request import Sampling
from toolkit.tables import Cell, Report, Table


def evaluate_router(
    spec: specs.Source | RouteEvaluateSpec,
    out: str | Path | None = None,
    *,
    overrides: Sequence[str] = (),
    smoke: bool = False,
    overwrite: bool = False,
    quiet: bool = False,
) -> RouteResult:
    """Judge a router on prompts whose expert is known, or whose answers were measured; see `RouteEvaluateSpec`.

    What the numbers mean stands at `judge` and `judge_outcomes`. A folder gets them as `results.json`, and the
    cost-quality curve of two experts as `curve.png` where the spec asks for it.

    Raises:
        SpecError: the spec is wrong, or names experts that the router does not know.
        DataError: a row without a prompt; with a base, also one without an answer, or too long for the base; with
            outcomes, no row that has a score of every expert.
        UnsupportedError: a curve is to be drawn and matplotlib is not installed.
        OutputError: `out` exists.
    """
    loaded = specs.load(spec, RouteEvaluateSpec, overrides=overrides, smoke=smoke)
    folder = out or loaded.out
    if folder:
        check_free(Path(folder), overwrite=overwrite)
    if loaded.plot:
        from toolkit.jobs.plots import check_matplotlib

        check_matplotlib()
    router = load_router(loaded.router, trust_remote_code=loaded.trust_remote_code)
    prompts, result = _by_outcomes(loaded, router) if loaded.outcomes else _by_labels(loaded, router, quiet)
    if loaded.before is not None:
        before = load_router(loaded.before, trust_remote_code=loaded.trust_remote_code)
        moved = moved_decisions(before, router, prompts)
        numbers, tables = {**result.numbers, "moved": moved.numbers}, [*result.tables, *moved.tables]
        result = replace(result, numbers=numbers, tables=tables)
    if folder:
        with staged(Path(folder), overwrite=overwrite) as partial:
            write_text(partial / "results.json", json.dumps(result.to_dict(), indent=2) + "\n")
            if loaded.plot and result.curves:
                from toolkit.jobs.plots import save_figure
                from toolkit.jobs.route_plot import draw_curves

                save_figure(draw_curves(result.curves), partial / "curve.png")
    return result


def _by_outcomes(spec: RouteEvaluateSpec, router: Router) -> tuple[Sequence[str], RouteResult]:
    assert spec.outcomes is not None
    examples = complete(_ordered(read_outcomes(spec.outcomes), router, spec))
    choices = router.choose(examples.prompts)
    experts = list(router.experts)
    chosen = np.array([experts.index(choice.expert) if choice.expert in experts else -1 for choice in choices])
    predicts = router.module.SCORES == "quality"
    result = judge_outcomes(examples, _scores(choices), chosen, router.domains, predicts=predicts)
    return examples.prompts, result


def _ordered(examples: Examples, router: Router, spec: RouteEvaluateSpec) -> Examples:
    """Return the examples with the experts in the router's order."""
    if set(examples.experts) != set(router.experts):
        given, known = ", ".join(examples.experts), ", ".join(router.experts)
        raise spec.error([Problem("outcomes", f"of {given}; the router chooses among {known}")])
    columns = [examples.experts.index(name) for name in router.experts]
    quality, cost = examples.quality[:, columns], examples.cost[:, columns]
    return Examples(router.experts, examples.prompts, quality, cost, examples.categories, examples.labelled)


def _scores(choices: Sequence[Choice]) -> NDArray[np.float32]:
    """Return `[B, N]`."""
    return np.array([list(choice.scores.values()) for choice in choices], np.float32)


def _by_labels(loaded: RouteEvaluateSpec, router: Router, quiet: bool) -> tuple[Sequence[str], RouteResult]:
    assert loaded.data is not None
    unknown = [name for name in loaded.data if name not in router.experts]
    if unknown:
        known = ", ".join(router.experts)
        raise loaded.error([Problem(f"data.{n}", f"not an expert of the router (known: {known})") for n in unknown])
    rows = {name: read_rows(files)[: loaded.limit] for name, files in loaded.data.items()}
    prompts = [user_text(row) for name in rows for row in rows[name]]
    experts = list(router.experts)
    labels = np.array([experts.index(name) for name in rows for _ in rows[name]])
    if loaded.base is None:
        choices = router.choose(prompts)
        experts += [name for name in dict.fromkeys(choice.expert for choice in choices) if name not in experts]
        chosen = np.array([experts.index(choice.expert) for choice in choices])
        result = judge(experts, labels, chosen, scores=_scores(choices), temperature=router.policy.temperature)
        return prompts, result
    experts = [*experts, *([BASE] if BASE not in experts else [])]
    options = {"device": loaded.device, "trust_remote_code": loaded.trust_remote_code}
    with Engine(loaded.base, loaded.adapters, router, **options) as engine:
        chosen = _chosen(engine, prompts, experts)
        quality = _quality(loaded, engine, [row for name in rows for row in rows[name]], experts, quiet)
    return prompts, judge(experts, labels, chosen, quality)


def _chosen(engine: Engine, prompts: Sequence[str], experts: Sequence[str]) -> np.ndarray:
    assert engine.router is not None
    return np.array([experts.index(choice.expert) for choice in engine.router.choose(prompts)])


def _quality(
    spec: RouteEvaluateSpec, engine: Engine, rows: Sequence[Any], experts: Sequence[str], quiet: bool
) -> np.ndarray:
    """Let every expert answer every prompt; return `[B, N]` of right (1) and wrong (0)."""
    for row in rows:
        check_prompt(engine, row, spec.max_tokens)
    pairs = [split_answer(row) for row in rows]
    sampling = Sampling(max_tokens=spec.max_tokens)
    with track("asking every expert", len(rows) * len(experts), unit="prompts", quiet=quiet) as progress:
        tickets = [
            [
                engine.submit(p, name, sampling, on_delta=lambda d: progress.advance() if d.finished else None)
                for p, _ in pairs
            ]
            for name in experts
        ]
        while engine.has_work:
            engine.step()
    expected = [answer for _, answer in pairs]
    return np.array([exact_match([t.answer().text for t in row], expected) for row in tickets], float).T


@dataclass(frozen=True)
class Explanation(Report):
    """Why a router chose what it chose for one prompt."""


def explain_route(router: Router | str | Path, prompt: str, *, trust_remote_code: bool = False) -> Explanation:
    """Return the scores of every expert for a prompt, best first, and what the policy made of them.

    Args:
        router: a router, or its folder.
        prompt: what a user would ask.
        trust_remote_code: run code that comes with the model of a saved router's embedding.

    Raises:
        DataError: the prompt is not text that UTF-8 can hold.
    """
    try:
        prompt.encode()
    except UnicodeEncodeError:
        raise DataError(f"the prompt {prompt!r} is not UTF-8 text") from None
    loaded = load_router(router, trust_remote_code=trust_remote_code)
    choice = loaded.choose([prompt])[0]
    ranked = sorted(choice.scores.items(), key=lambda item: -item[1])
    numbers: dict[str, Any] = {
        "prompt": prompt,
        "expert": choice.expert,
        "reason": choice.reason,
        "margin": choice.margin,
        "scores": dict(ranked),
        "weights": choice.weights,
        "router": loaded.kind,
        "version": loaded.version,
    }
    if loaded.references is not None:
        numbers["novelty"] = float(novelty(loaded.features([prompt]), loaded.references)[0])
    rows: list[list[Cell]] = [[name, score, choice.weights.get(name)] for name, score in ranked]
    rows += [[name, None, share] for name, share in choice.weights.items() if name not in choice.scores]
    title = f"{loaded.kind} router; chosen: {choice.expert}" + ("" if choice.reason == "best" else f", {choice.reason}")
    return Explanation(numbers, [Table(("expert", "score", "share"), rows, title, digits=3)])


def moved_decisions(before: Router | str | Path, after: Router | str | Path, prompts: Sequence[str]) -> Report:
    """Return on how many prompts a router decides otherwise than the one that it replaces, and from what to what.

    Args:
        before: the old router, or its folder.
        after: the new one, such as one that was fitted anew with one more expert.
        prompts: that both decide on.
    """
    old, new = ([choice.expert for choice in load_router(r).choose(prompts)] for r in (before, after))
    pairs: dict[tuple[str, str], int] = {}
    for pair in zip(old, new, strict=True):
        pairs[pair] = pairs.get(pair, 0) + 1
    moved = {pair: count for pair, count in sorted(pairs.items()) if pair[0] != pair[1]}
    changes = [{"from": a, "to": b, "prompts": count} for (a, b), count in moved.items()]
    numbers = {"prompts": len(prompts), "moved": sum(moved.values()), "changes": changes}
    rows: list[list[Cell]] = [[a, b, count] for (a, b), count in moved.items()]
    title = f"{numbers['moved']} of {len(prompts)} decisions moved"
    return Report(numbers, [Table(("from", "to", "prompts"), rows, title)])
