"""Judge a router by the answers of the experts that it chooses, and explain one choice."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from toolkit import specs
from toolkit.checkpoints.writer import check_free, staged, write_text
from toolkit.data.rows import read_rows, split_answer, user_text
from toolkit.errors import DataError, Problem
from toolkit.evaluation.metrics import exact_match
from toolkit.jobs.asking import check_prompt
from toolkit.progress import track
from toolkit.routing.evaluate import RouteResult, judge
from toolkit.routing.router import Router, load_router
from toolkit.routing.spec import RouteEvaluateSpec
from toolkit.serving.engine import Engine
from toolkit.serving.mix import BASE
from toolkit.serving.request import Sampling
from toolkit.tables import Report, Table


def evaluate_router(
    spec: specs.Source | RouteEvaluateSpec,
    out: str | Path | None = None,
    *,
    overrides: Sequence[str] = (),
    smoke: bool = False,
    overwrite: bool = False,
    quiet: bool = False,
) -> RouteResult:
    """Judge a router on prompts whose expert is known; see `RouteEvaluateSpec` and `judge`.

    Raises:
        SpecError: the spec is wrong, or names experts that the router does not know.
        DataError: a row without a prompt; with a base, also one without an answer, or too long for the base.
        OutputError: `out` exists.
    """
    loaded = specs.load(spec, RouteEvaluateSpec, overrides=overrides, smoke=smoke)
    folder = out or loaded.out
    if folder:
        check_free(Path(folder), overwrite=overwrite)
    router = load_router(loaded.router, trust_remote_code=loaded.trust_remote_code)
    unknown = [name for name in loaded.data if name not in router.experts]
    if unknown:
        known = ", ".join(router.experts)
        raise loaded.error([Problem(f"data.{n}", f"not an expert of the router (known: {known})") for n in unknown])
    rows = {name: read_rows(files)[: loaded.limit] for name, files in loaded.data.items()}
    prompts = [user_text(row) for name in rows for row in rows[name]]
    experts = list(router.experts)
    labels = np.array([experts.index(name) for name in rows for _ in rows[name]])
    quality = None
    if loaded.base is not None:
        experts = [*experts, *([BASE] if BASE not in experts else [])]
        options = {"device": loaded.device, "trust_remote_code": loaded.trust_remote_code}
        with Engine(loaded.base, loaded.adapters, router, **options) as engine:
            chosen = _chosen(engine, prompts, experts)
            quality = _quality(loaded, engine, [row for name in rows for row in rows[name]], experts, quiet)
    else:
        chosen = np.array([experts.index(choice.expert) for choice in router.choose(prompts)])
    result = judge(experts, labels, chosen, quality)
    if folder:
        with staged(Path(folder), overwrite=overwrite) as partial:
            write_text(partial / "results.json", json.dumps(result.to_dict(), indent=2) + "\n")
    return result


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
    """Return the scores of every expert for a prompt, best first.

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
    numbers = {
        "prompt": prompt,
        "expert": choice.expert,
        "margin": choice.margin,
        "scores": dict(ranked),
        "router": loaded.kind,
        "version": loaded.version,
    }
    rows = [[name, score, "chosen" if name == choice.expert else ""] for name, score in ranked]
    return Explanation(numbers, [Table(("expert", "score", ""), rows, f"{loaded.kind} router", digits=3)])
