"""Draw a load test with matplotlib, which is imported only when something is drawn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from toolkit.jobs.bench_serve.measure import Run
from toolkit.jobs.bench_serve.report import SHOWN_MODELS, rate_text
from toolkit.jobs.plots import COLORS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def draw(runs: Sequence[Run]) -> Figure:
    """Draw the distributions of TTFT and TPOT with their limits, and the TTFT of each model of the last run."""
    from matplotlib.figure import Figure

    several = len(runs[-1].by_model) > 1
    figure = Figure(figsize=(15 if several else 10, 4.4), layout="constrained")
    axes = [figure.add_subplot(1, 2 + several, at + 1) for at in range(2 + several)]
    limits = runs[0].limits
    _draw_shares(axes[0], runs, [[o.ttft for o in run.served] for run in runs], limits.ttft)
    axes[0].set_xlabel("milliseconds to the first token")
    _draw_shares(axes[1], runs, [[o.tpot for o in run.served] for run in runs], limits.tpot)
    axes[1].set_xlabel("milliseconds per token after the first")
    if several:
        _draw_models(axes[2], runs[-1])
    return figure


def _draw_shares(
    axes: Axes, runs: Sequence[Run], values: Sequence[Sequence[float | None]], limit: float | None
) -> None:
    """Draw the share of requests that took at most so long, a line per run."""
    for at, (run, of_run) in enumerate(zip(runs, values, strict=True)):
        times = np.sort([1000 * value for value in of_run if value is not None])
        shares = np.arange(1, len(times) + 1) / max(len(run.outcomes), 1)
        axes.step(times, 100 * shares, where="post", color=COLORS[at % len(COLORS)], label=rate_text(run.rate))
    if limit is not None:
        axes.axvline(1000 * limit, color="black", linestyle="--", linewidth=1, label="limit")
    axes.set_ylabel("requests, %")
    axes.set_ylim(0, 101)
    axes.set_xlim(left=0)
    axes.grid(alpha=0.3)
    axes.legend()


def _draw_models(axes: Axes, run: Run) -> None:
    """Draw median and 99th percentile of the TTFT of each model."""
    found = list(run.models().items())[:SHOWN_MODELS]
    times = {name: of["ttft"] for name, of in found if of["ttft"]}
    for name, color in (("p50", COLORS[0]), ("p99", COLORS[1])):
        axes.plot([1000 * t[name] for t in times.values()], list(times), "o", color=color, label=name)
    axes.set_xlabel(f"milliseconds to the first token ({rate_text(run.rate)})")
    axes.set_xlim(left=0)
    axes.invert_yaxis()
    axes.grid(alpha=0.3)
    axes.legend()
