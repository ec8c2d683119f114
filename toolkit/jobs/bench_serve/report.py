"""The tables of a load test."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from toolkit.jobs.bench_serve.measure import Run, highest_rate, milliseconds
from toolkit.jobs.bench_serve.spec import BenchSpec
from toolkit.tables import Report, Table

SHOWN_MODELS = 20
"""Models of a run that get a row: those that were asked for most."""


def report(spec: BenchSpec, models: Sequence[str], runs: Sequence[Run]) -> Report:
    """Return what was measured."""
    measured = [run.numbers() for run in runs]
    finite = [found | {"rate": _number(found["rate"])} for found in measured]
    numbers = {"url": spec.url, "models": list(models), "runs": finite}
    numbers |= {"limits": spec.limits.model_dump(), "highest_rate_within_limits": _number(highest_rate(runs))}
    tables = [_runs_table(spec, measured), _latency_table(measured)]
    if len(models) > 1:
        tables += [_models_table(found) for found in measured]
    return Report(numbers, tables)


def _runs_table(spec: BenchSpec, measured: Sequence[dict[str, Any]]) -> Table:
    columns = "rate", "requests", "failed", "requests/s", "prompt tokens/s", "tokens/s", "within %", "good/s", "fair"
    keys = "requests", "failed", "requests_per_second", "prompt_tokens_per_second", "tokens_per_second"
    rows = [
        [
            rate_text(found["rate"]),
            *(found[key] for key in keys),
            100 * found["within_limits"],
            found["goodput"],
            found["fairness"],
        ]
        for found in measured
    ]
    limits = {"TTFT": spec.limits.ttft, "TPOT": spec.limits.tpot}
    shown = " and ".join(f"{name} <= {1000 * value:g} ms" for name, value in limits.items() if value) or "none"
    return Table(columns, rows, f"{spec.url}, limits: {shown}", digits=2)


def _latency_table(measured: Sequence[dict[str, Any]]) -> Table:
    names = "mean", "p50", "p90", "p95", "p99"
    rows = [
        [rate_text(found["rate"]), label, *(milliseconds(found[key], name) for name in names)]
        for found in measured
        for label, key in (("TTFT", "ttft"), ("TPOT", "tpot"), ("whole", "latency"))
    ]
    return Table(("rate", "milliseconds", *names), rows, digits=1)


def _models_table(found: dict[str, Any]) -> Table:
    columns = "model", "requests", "failed", "tokens", "TTFT p50", "TTFT p99", "TPOT p50", "within %", "tokens/s each"
    rows = [
        [
            name,
            of["requests"],
            of["failed"],
            of["tokens"],
            milliseconds(of["ttft"], "p50"),
            milliseconds(of["ttft"], "p99"),
            milliseconds(of["tpot"], "p50"),
            100 * of["within_limits"],
            of["speed"],
        ]
        for name, of in list(found["models"].items())[:SHOWN_MODELS]
    ]
    return Table(columns, rows, f"by model, {rate_text(found['rate'])}, milliseconds")


def rate_text(rate: float | None) -> str:
    """Return a rate of arrivals for people."""
    if rate is None:
        return "trace"
    return "all at once" if math.isinf(rate) else f"{rate:g}/s"


def _number(rate: float | None) -> float | str | None:
    """Return a rate as JSON can hold it."""
    return "inf" if rate is not None and math.isinf(rate) else rate
