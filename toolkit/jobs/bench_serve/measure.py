"""Throughput, latency percentiles, goodput and fairness of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from toolkit.jobs.bench_serve.drive import Outcome
from toolkit.jobs.bench_serve.spec import ServiceLimits

PERCENTILES = (50, 90, 95, 99)


@dataclass(frozen=True)
class Run:
    """One run of a load test.

    Attributes:
        rate: arrivals per second that were asked for; `None` for a trace.
        outcomes: of its requests.
        limits: what counts as good.
    """

    rate: float | None
    outcomes: Sequence[Outcome]
    limits: ServiceLimits

    @property
    def served(self) -> list[Outcome]:
        """The requests that did not fail."""
        return [outcome for outcome in self.outcomes if not outcome.error]

    @property
    def seconds(self) -> float:
        """From the start to the last token."""
        return max(outcome.last for outcome in self.outcomes)

    @property
    def good(self) -> int:
        """Requests within the limits; those that failed are not."""
        return sum(is_good(outcome, self.limits) for outcome in self.outcomes)

    @property
    def is_within(self) -> bool:
        """Whether enough requests are within the limits."""
        return self.good >= self.limits.share * len(self.outcomes)

    @property
    def by_model(self) -> dict[str, list[Outcome]]:
        """The requests of each model, the most asked for first."""
        found: dict[str, list[Outcome]] = {}
        for outcome in self.outcomes:
            found.setdefault(outcome.job.model, []).append(outcome)
        return dict(sorted(found.items(), key=lambda item: (-len(item[1]), item[0])))

    def numbers(self) -> dict[str, Any]:
        """Return what was measured, times in seconds."""
        served, seconds = self.served, self.seconds
        failed = [outcome for outcome in self.outcomes if outcome.error]
        return {
            "rate": self.rate,
            "requests": len(self.outcomes),
            "failed": len(failed),
            "errors": sorted({outcome.error for outcome in failed})[:5],
            "seconds": seconds,
            "requests_per_second": len(served) / seconds,
            "prompt_tokens_per_second": sum(o.prompt_tokens for o in served) / seconds,
            "tokens_per_second": sum(o.tokens for o in served) / seconds,
            "ttft": summary([o.ttft for o in served]),
            "tpot": summary([o.tpot for o in served]),
            "latency": summary([o.latency for o in served]),
            "within_limits": self.good / len(self.outcomes),
            "goodput": self.good / seconds,
            "fairness": jain([model["speed"] for model in self.models().values() if model["speed"] is not None]),
            "client_delay": max(o.sent - o.job.at for o in self.outcomes),
            "models": self.models(),
        }

    def models(self) -> dict[str, dict[str, Any]]:
        """Return what was measured for each model; `speed` is the mean of tokens per second of latency."""
        return {name: _of_model(outcomes, self.limits) for name, outcomes in self.by_model.items()}


def _of_model(outcomes: Sequence[Outcome], limits: ServiceLimits) -> dict[str, Any]:
    served = [outcome for outcome in outcomes if not outcome.error]
    speeds = [outcome.tokens / outcome.latency for outcome in served if outcome.latency > 0]
    return {
        "requests": len(outcomes),
        "failed": len(outcomes) - len(served),
        "tokens": sum(outcome.tokens for outcome in served),
        "ttft": summary([outcome.ttft for outcome in served]),
        "tpot": summary([outcome.tpot for outcome in served]),
        "within_limits": sum(is_good(outcome, limits) for outcome in outcomes) / len(outcomes),
        "speed": float(np.mean(speeds)) if speeds else None,
    }


def is_good(outcome: Outcome, limits: ServiceLimits) -> bool:
    """Tell whether a request was answered within the limits; an answer of one token has no time per token."""
    if outcome.ttft is None:
        return False
    first_in_time = limits.ttft is None or outcome.ttft <= limits.ttft
    return first_in_time and (limits.tpot is None or outcome.tpot is None or outcome.tpot <= limits.tpot)


def summary(values: Sequence[float | None]) -> dict[str, float] | None:
    """Return mean and percentiles, linear between the values, or `None` if there is no value."""
    known = [value for value in values if value is not None]
    if not known:
        return None
    found = np.percentile(known, PERCENTILES)
    return {"mean": float(np.mean(known))} | {f"p{p}": float(v) for p, v in zip(PERCENTILES, found, strict=True)}


def jain(values: Sequence[float]) -> float | None:
    """Return Jain's fairness index, from 1/n (one has everything) to 1 (all have the same).

    `(sum x)^2 / (n sum x^2)`; Jain, Chiu, Hawe, "A Quantitative Measure of Fairness and Discrimination", 1984.
    """
    squares = sum(value * value for value in values)
    return sum(values) ** 2 / (len(values) * squares) if squares else None


def highest_rate(runs: Sequence[Run]) -> float | None:
    """Return the highest rate of which enough requests were within the limits: DistServe's goodput.

    Zhong et al., "DistServe", 2024, arXiv:2401.09670.
    """
    return max((run.rate for run in runs if run.rate is not None and run.is_within), default=None)


def milliseconds(found: Mapping[str, float] | None, name: str) -> float | None:
    """Return one of the numbers of a `summary` in milliseconds."""
    return None if found is None else 1000 * found[name]
