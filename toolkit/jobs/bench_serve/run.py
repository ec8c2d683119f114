"""Load-test a server."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from toolkit import specs
from toolkit.errors import UnsupportedError
from toolkit.jobs.bench_serve.drive import drive, open_client, served_models
from toolkit.jobs.bench_serve.measure import Run
from toolkit.jobs.bench_serve.report import rate_text, report
from toolkit.jobs.bench_serve.spec import BenchSpec
from toolkit.jobs.bench_serve.workload import Job, poisson_jobs, trace_jobs
from toolkit.progress import track
from toolkit.tables import Report

_Result = TypeVar("_Result")

if TYPE_CHECKING:
    import httpx


def bench_serve(
    spec: specs.Source | BenchSpec,
    *,
    overrides: Sequence[str] = (),
    options: Mapping[str, Any] | None = None,
    smoke: bool = False,
    plot: str | Path | None = None,
    overwrite: bool = False,
    quiet: bool = False,
) -> Report:
    """Ask a server that speaks OpenAI's API for much at once, and measure how it does.

    Requests go out when they are due, whatever became of those before (an open loop), so a server that falls behind
    shows the queue that its users would wait in.

    Args:
        spec: a YAML file, a dict or a `BenchSpec`.
        overrides: `key.path=value` changes to the spec.
        options: values that take precedence over the spec's own.
        smoke: apply the spec's own `smoke:` block.
        plot: a PNG, SVG or PDF file to draw the distributions of latency into.
        overwrite: replace that file if it exists.
        quiet: show no progress.

    Returns:
        Throughput, percentiles of TTFT and TPOT, goodput and fairness of every run.

    Raises:
        SpecError: the spec is wrong.
        UnsupportedError: the server cannot be reached, does not list a model that is asked for, or answers nothing.
        DataError: the trace cannot be used.
        OutputError: the plot cannot be written.
    """
    loaded = specs.load(spec, BenchSpec, overrides=overrides, options=options, smoke=smoke)
    if plot is not None:
        from toolkit.jobs.plots import check_plot

        check_plot(Path(plot), overwrite=overwrite)
    models, runs = _finished(bench(loaded, quiet=quiet))
    if plot is not None:
        from toolkit.jobs.bench_serve.plot import draw
        from toolkit.jobs.plots import save_figure

        save_figure(draw(runs), Path(plot))
    return report(loaded, models, runs)


def _finished(work: Coroutine[Any, Any, _Result]) -> _Result:
    """Run a coroutine to its end: in a thread of its own where this one has a loop already, as in a notebook."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(work)
    with ThreadPoolExecutor(1) as own:
        return own.submit(asyncio.run, work).result()


async def bench(
    spec: BenchSpec, *, quiet: bool = False, transport: httpx.AsyncBaseTransport | None = None
) -> tuple[list[str], list[Run]]:
    """Run a load test; return the models that were asked for, and its runs.

    Args:
        spec: what to ask.
        quiet: show no progress.
        transport: carries the requests, in place of the network.
    """
    async with open_client(spec, transport) as client:
        models = await _models(client, spec)
        plans = _plans(spec, models)
        await _warm_up(client, spec, models)
        runs: list[Run] = []
        for rate, jobs in plans:
            with track(rate_text(rate), len(jobs), unit="requests", quiet=quiet) as progress:
                runs.append(Run(rate, await drive(client, spec, jobs, progress), spec.limits))
            _check_any_served(runs[-1])
    return models, runs


def _plans(spec: BenchSpec, models: Sequence[str]) -> list[tuple[float | None, list[Job]]]:
    if spec.trace is not None:
        return [(None, trace_jobs(spec, models))]
    return [(rate, poisson_jobs(spec, models, rate)) for rate in spec.rates]


async def _models(client: httpx.AsyncClient, spec: BenchSpec) -> list[str]:
    served = await served_models(client)
    # A composition is served without being listed, so only a server's own word refuses a name.
    models = spec.models or [name for name in served if name != "auto"]
    if not models:
        raise UnsupportedError(f"{spec.url}: lists no model; name one")
    return models


async def _warm_up(client: httpx.AsyncClient, spec: BenchSpec, models: Sequence[str]) -> None:
    """Ask each model a few times, so that no run pays for what only the first request needs."""
    if not spec.warmup:
        return
    first = poisson_jobs(spec, models, float("inf"))[0]
    jobs = [replace(first, model=model) for model in models for _ in range(spec.warmup)]
    with track("warm-up", len(jobs), unit="requests", quiet=True) as progress:
        run = Run(None, await drive(client, spec, jobs, progress), spec.limits)
    for model, outcomes in run.by_model.items():
        if all(outcome.error for outcome in outcomes):
            raise UnsupportedError(f"{spec.url}: {model}: {outcomes[0].error}")


def _check_any_served(run: Run) -> None:
    if not run.served:
        raise UnsupportedError(f"every request failed, the first with: {run.outcomes[0].error}")
