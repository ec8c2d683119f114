"""Fill a table of models and tasks: answers through the serving engine, likelihoods through the same model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toolkit import specs
from toolkit.checkpoints.writer import check_free, staged, write_text
from toolkit.data.render import Renderer
from toolkit.data.rows import Row, read_rows, split_answer
from toolkit.evaluation.metrics import exact_match, likelihood, percent
from toolkit.evaluation.spec import EvaluateSpec, TaskSpec
from toolkit.jobs.asking import check_prompt
from toolkit.jobs.client import ask
from toolkit.progress import Progress, track
from toolkit.routing.router import load_router
from toolkit.serving.engine import Engine
from toolkit.serving.prompts import Prompt
from toolkit.serving.request import Sampling
from toolkit.serving.serve import background_server
from toolkit.tables import Cell, Report, Table


@dataclass(frozen=True)
class EvaluateResult(Report):
    """A filled table; `numbers["scores"][row][task]` holds its cells."""


def evaluate(
    spec: specs.Source | EvaluateSpec,
    out: str | Path | None = None,
    *,
    overrides: Sequence[str] = (),
    smoke: bool = False,
    overwrite: bool = False,
    quiet: bool = False,
) -> EvaluateResult:
    """Measure models on tasks.

    Args:
        spec: a YAML file, a dict or an `EvaluateSpec`.
        out: folder for `results.json` and `results.md`, instead of the spec's own.
        overrides: `key.path=value` changes to the spec.
        smoke: apply the spec's own `smoke:` block.
        overwrite: replace `out` if it exists.
        quiet: show no progress.

    Raises:
        SpecError: the spec is wrong.
        DataError: a row without an answer, or one too long for a model.
        OutputError: `out` exists.
    """
    loaded = specs.load(spec, EvaluateSpec, overrides=overrides, smoke=smoke)
    folder = out or loaded.out
    if folder:
        check_free(Path(folder), overwrite=overwrite)
    rows = {name: read_rows(task.data)[: task.limit] for name, task in loaded.tasks.items()}
    for name, task in loaded.tasks.items():
        if task.metric == "exact_match":
            for row in rows[name]:
                split_answer(row)
    scores = _measure(loaded, rows, quiet)
    result = _result(loaded, rows, scores)
    if folder:
        with staged(Path(folder), overwrite=overwrite) as partial:
            write_text(partial / "results.json", json.dumps(result.to_dict(), indent=2) + "\n")
            write_text(partial / "results.md", "\n\n".join(t.to_markdown() for t in result.tables) + "\n")
    return result


Scores = dict[str, dict[str, float]]


def _measure(spec: EvaluateSpec, rows: dict[str, list[Row]], quiet: bool) -> Scores:
    """Return the score of every model on every task that some row of the table wants."""
    wanted = list(dict.fromkeys((name, task) for row in spec.table_rows.values() for task, name in row.items()))
    scores: Scores = {}
    options: dict[str, Any] = {"device": spec.device, "trust_remote_code": spec.trust_remote_code}
    total = sum(len(rows[task]) for _, task in wanted)
    with track("evaluating", total, unit="prompts", quiet=quiet) as progress:
        own = [(name, task) for name, task in wanted if name not in spec.models]
        if own:
            router = spec.router
            if router is not None:
                router = load_router(router, trust_remote_code=spec.trust_remote_code)
            with Engine(spec.base, spec.adapters, router, **options) as engine:
                _fill(spec, engine, own, rows, scores, progress)
        for model in spec.models:
            part = [("base", task) for name, task in wanted if name == model]
            if part:
                with Engine(spec.models[model], **options) as engine:
                    found: Scores = {}
                    _fill(spec, engine, part, rows, found, progress)
                    scores[model] = found["base"]
    return scores


def _fill(
    spec: EvaluateSpec,
    engine: Engine,
    wanted: Sequence[tuple[str, str]],
    rows: dict[str, list[Row]],
    scores: Scores,
    progress: Progress,
) -> None:
    """Measure one engine's models; all exact-match prompts of all of them go through it together."""
    prompts: list[tuple[Prompt, str, int]] = []
    owners: list[tuple[str, str, str]] = []
    asking = [(name, task) for name, task in wanted if spec.tasks[task].metric == "exact_match"]
    for task in dict.fromkeys(task for _, task in asking):
        for row in rows[task]:
            check_prompt(engine, row, spec.tasks[task].max_tokens, f"tasks.{task}.max_tokens")
    for name, task in asking:
        for row in rows[task]:
            asked, expected = split_answer(row)
            prompts.append((asked, name, spec.tasks[task].max_tokens))
            owners.append((name, task, expected))
    for name, task in wanted:
        if spec.tasks[task].metric == "perplexity":
            scores.setdefault(name, {})[task] = _perplexity(engine, name, rows[task])
            progress.advance(len(rows[task]))
    answers = _answers_over_http(engine, prompts, progress) if spec.over_http else _answers(engine, prompts, progress)
    for name, task in asking:
        mine = [i for i, owner in enumerate(owners) if owner[:2] == (name, task)]
        right = exact_match([answers[i] for i in mine], [owners[i][2] for i in mine])
        scores.setdefault(name, {})[task] = percent(right)


def _answers(engine: Engine, prompts: Sequence[tuple[Prompt, str, int]], progress: Progress) -> list[str]:
    tickets = [
        engine.submit(
            prompt, name, Sampling(max_tokens=limit), on_delta=lambda d: progress.advance() if d.finished else None
        )
        for prompt, name, limit in prompts
    ]
    while engine.has_work:
        engine.step()
    return [ticket.answer().text for ticket in tickets]


def _answers_over_http(engine: Engine, prompts: Sequence[tuple[Prompt, str, int]], progress: Progress) -> list[str]:
    with background_server(engine) as url:
        return ask(url, prompts, progress)


def _perplexity(engine: Engine, name: str, rows: Sequence[Row]) -> float:
    renderer = Renderer(engine.tokenizer, engine.max_model_len, too_long="truncate", empty="skip")
    examples, _ = renderer.render_all(rows)
    with engine.using(name) as model:
        return likelihood(model, examples, pad=int(engine.tokenizer.pad_token_id or 0)).perplexity


def _result(spec: EvaluateSpec, rows: dict[str, list[Row]], scores: Scores) -> EvaluateResult:
    tasks = spec.tasks
    table_rows: list[list[Cell]] = []
    numbers: Scores = {}
    for label, row in spec.table_rows.items():
        numbers[label] = {task: scores[name][task] for task, name in row.items()}
        percents = [s for task, s in numbers[label].items() if tasks[task].metric == "exact_match"]
        mean = sum(percents) / len(percents) if percents else None
        table_rows.append([label, *(numbers[label].get(task) for task in tasks), mean])
    columns = ["model", *(_header(name, task) for name, task in tasks.items()), "mean"]
    mixed = any(task.metric == "exact_match" for task in tasks.values())
    if not mixed:
        columns, table_rows = columns[:-1], [row[:-1] for row in table_rows]
    title = "exact match, percent" if mixed else "perplexity"
    counts = {name: len(found) for name, found in rows.items()}
    return EvaluateResult({"scores": numbers, "rows": counts}, [Table(columns, table_rows, title)])


def _header(name: str, task: TaskSpec) -> str:
    return f"{name} (perplexity)" if task.metric == "perplexity" else name
