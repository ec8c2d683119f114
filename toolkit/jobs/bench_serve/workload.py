"""What a load test asks, and when: arrivals, models by popularity, prompts that begin alike."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from toolkit.data.rows import Row, read_rows
from toolkit.errors import DataError
from toolkit.jobs.bench_serve.spec import BenchSpec

WORDS = (
    "time year people way day man thing woman life child world school state family student group country problem hand"
    " part place case week company system program question work government number night point home water room mother"
    " area money story fact month lot right study book eye job word business issue side kind head house service friend"
    " father power hour game line end member law car city name"
).split()
"""Common nouns, most of them one token of any tokenizer."""


@dataclass(frozen=True)
class Job:
    """One request to be.

    Attributes:
        at: seconds after the start of the run at which it arrives.
        model: that it asks for.
        prompt: a text.
        max_tokens: of the answer.
    """

    at: float
    model: str
    prompt: str
    max_tokens: int


def poisson_jobs(spec: BenchSpec, models: Sequence[str], rate: float) -> list[Job]:
    """Return the requests of a run: all but the arrivals are the same at every rate."""
    arrivals = poisson(rate, spec.requests, spec.seed)
    return _jobs(spec, models, [{"at": float(at)} for at in arrivals])


def trace_jobs(spec: BenchSpec, models: Sequence[str]) -> list[Job]:
    """Return the requests of a trace; what its rows leave open is drawn.

    Raises:
        DataError: a row with a field that is unknown or of the wrong kind.
    """
    assert spec.trace is not None
    rows = [_checked(row) for row in read_rows(spec.trace)]
    return _jobs(spec, models, sorted(rows, key=lambda row: row["at"]))


def poisson(rate: float, count: int, seed: int) -> np.ndarray:
    """Return the times `[count]`, in seconds, of a Poisson process of `rate` events per second."""
    if math.isinf(rate):
        return np.zeros(count)
    return np.cumsum(np.random.default_rng([seed, 0]).exponential(1 / rate, count))


def popularity(count: int, exponent: float) -> np.ndarray:
    """Return Zipf's distribution `[count]`: the k-th has a probability in proportion to `k ** -exponent`."""
    weights = np.arange(1, count + 1, dtype=np.float64) ** -exponent
    return weights / weights.sum()


def _jobs(spec: BenchSpec, models: Sequence[str], rows: Sequence[dict[str, Any]]) -> list[Job]:
    count = len(rows)
    asked = np.random.default_rng([spec.seed, 1]).choice(len(models), count, p=popularity(len(models), spec.zipf))
    lengths = np.random.default_rng([spec.seed, 2]).integers(*spec.max_tokens, count, endpoint=True)
    drawn = zip(rows, asked, _prompts(spec, count), lengths, strict=True)
    return [
        Job(**({"model": models[model], "prompt": prompt, "max_tokens": int(length)} | row))
        for row, model, prompt, length in drawn
    ]


def _prompts(spec: BenchSpec, count: int) -> list[str]:
    draw = np.random.default_rng([spec.seed, 3])
    beginnings = [_words(draw, spec.shared_words) for _ in range(spec.prefixes)]
    prompts: list[str] = []
    for _ in range(count):
        beginning = beginnings[int(draw.integers(spec.prefixes))]
        own = _words(draw, int(draw.integers(*spec.prompt_words, endpoint=True)))
        prompts.append(" ".join([*beginning, *own]))
    return prompts


def _words(draw: np.random.Generator, count: int) -> list[str]:
    return [WORDS[at] for at in draw.integers(len(WORDS), size=count)]


def _checked(row: Row) -> dict[str, Any]:
    """Return the fields of a row of a trace that say something."""
    kinds: dict[str, type | tuple[type, ...]] = {"at": (int, float), "model": str, "prompt": str, "max_tokens": int}
    found = {key: value for key, value in row.data.items() if value is not None}
    unknown = sorted(set(found) - set(kinds))
    if unknown:
        raise DataError(f"{row.place}: unknown field {unknown[0]!r} (known: {', '.join(kinds)})")
    if "at" not in found:
        raise DataError(f"{row.place}: has no 'at', the seconds at which the request arrives")
    for key, value in found.items():
        wrong = not isinstance(value, kinds[key]) or isinstance(value, bool)
        if wrong or (key == "at" and not 0 <= value < math.inf) or (key == "max_tokens" and value < 1):
            raise DataError(f"{row.place}: {key} is {value!r}")
    return found | {"at": float(found["at"])}
