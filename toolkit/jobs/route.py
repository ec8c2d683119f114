"""Judge a router by the answers of the experts that it chooses, and explain one choice."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import Field

from toolkit import specs
from toolkit.checkpoints.writer import staged, write_text
from toolkit.data.rows import read_rows, split_answer, user_text
from toolkit.errors import Problem
from toolkit.evaluation.metrics import exact_match
from toolkit.progress import track
from toolkit.routing.evaluate import RouteResult, judge
from toolkit.routing.router import load_router
from toolkit.serving.engine import BASE, Engine
from toolkit.serving.request import Sampling
from toolkit.specs import Files, Folder, Spec
from toolkit.tables import Report, Table


class RouteEvaluateSpec(Spec):
    """A router to judge.

    Attributes:
        router: folder of the fitted router.
        data: expert -> JSONL files of prompts that were made for it.
        base: model that the experts belong to; without it only the choices are judged, not their answers.
        adapters: PEFT LoRA folder of each expert.
        max_tokens: most tokens of an answer.
        limit: most prompts of each expert, the first ones.
        device: `auto`, `cpu`, `cuda`, ...
        out: folder for the results.
    """

    router: Folder
    data: Annotated[dict[str, Files], Field(min_length=1)]
    base: Any = None
    adapters: dict[str, Folder] = Field(default_factory=dict)
    max_tokens: Annotated[int, Field(ge=1)] = 64
    limit: Annotated[int, Field(ge=1)] | None = None
    device: str = "auto"
    out: Folder | None = None


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
    """
    loaded = specs.load(spec, RouteEvaluateSpec, overrides=overrides, smoke=smoke)
    router = load_router(loaded.router)
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
        with Engine(loaded.base, loaded.adapters, router, device=loaded.device) as engine:
            chosen = _chosen(engine, prompts, experts)
            quality = _quality(loaded, engine, [row for name in rows for row in rows[name]], experts, quiet)
    else:
        chosen = np.array([experts.index(choice.expert) for choice in router.choose(prompts)])
    result = judge(experts, labels, chosen, quality)
    folder = out or loaded.out
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


def explain_route(router: str | Path, prompt: str) -> Explanation:
    """Return the scores of every expert for a prompt, best first."""
    loaded = load_router(router)
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
