"""The spec of a load test."""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from toolkit.specs import Folder, Spec


def _as_range(value: Any) -> Any:
    found = re.fullmatch(r"(\d+)(?:-(\d+))?", value) if isinstance(value, str) else None
    if found:
        return int(found[1]), int(found[2] or found[1])
    return (value, value) if isinstance(value, int) else value


def _ordered(value: tuple[int, int]) -> tuple[int, int]:
    if value[0] > value[1]:
        raise ValueError(f"the least, {value[0]}, is more than the most, {value[1]}")
    return value


def _root(url: str) -> str:
    if not url.startswith(("http://", "https://")):
        raise ValueError("expected an address such as http://127.0.0.1:8000")
    return url.rstrip("/").removesuffix("/v1")


Count = Annotated[int, Field(ge=1)]
Range = Annotated[tuple[Count, Count], BeforeValidator(_as_range), AfterValidator(_ordered)]
"""A number, or the least and the most of numbers that are equally likely: `64`, `32-128`, `[32, 128]`."""

Seconds = Annotated[float, Field(gt=0)]


class ServiceLimits(Spec):
    """What a request must stay within to count as good.

    Attributes:
        ttft: most seconds to the first token; by default any.
        tpot: most seconds per token after the first; by default any.
        share: of the requests that must stay within both for a rate to count as served.
    """

    ttft: Seconds | None = None
    tpot: Seconds | None = None
    share: Annotated[float, Field(gt=0, le=1)] = 0.9


class BenchSpec(Spec):
    """A load test.

    Attributes:
        url: of the server, with or without `/v1`.
        api_key: that requests carry.
        models: that are asked for, the most popular first; by default all that the server lists but `auto`.
        zipf: exponent of their popularity: the k-th is asked for in proportion to `k ** -zipf`; 0 asks for all alike.
        rates: Poisson arrivals per second, a run for each; infinity sends everything at once.
        requests: of a run.
        trace: JSONL, CSV or Parquet file of arrivals, in place of `rates` and `requests`: `at` in seconds, and where a
            row has them `model`, `prompt` and `max_tokens`.
        concurrency: most requests under way; those beyond it wait, and their time runs. By default no bound.
        prompt_words: words of a prompt after what it shares.
        shared_words: words that prompts begin with in common.
        prefixes: different beginnings of that length.
        max_tokens: tokens of an answer.
        ignore_eos: ask for answers of exactly that length, which this toolkit's server and vLLM grant.
        chat: ask `/v1/chat/completions`, not `/v1/completions`.
        temperature: of the answers.
        limits: what counts as good.
        warmup: requests to each model before anything is measured.
        timeout: seconds after which a request is given up and counts as failed.
        seed: of arrivals, models and prompts.
    """

    url: Annotated[str, AfterValidator(_root)]
    api_key: str | None = None
    models: list[str] = Field(default_factory=list)
    zipf: Annotated[float, Field(ge=0)] = 0.0
    rates: Annotated[list[Annotated[float, Field(gt=0)]], Field(min_length=1)] = Field(default_factory=lambda: [4.0])
    requests: Count = 100
    trace: Folder | None = None
    concurrency: Count | None = None
    prompt_words: Range = (64, 64)
    shared_words: Annotated[int, Field(ge=0)] = 0
    prefixes: Count = 1
    max_tokens: Range = (32, 32)
    ignore_eos: bool = True
    chat: bool = False
    temperature: Annotated[float, Field(ge=0, le=2)] = 0.0
    limits: ServiceLimits = ServiceLimits()
    warmup: Annotated[int, Field(ge=0)] = 1
    timeout: Seconds = 600.0
    seed: Annotated[int, Field(ge=0)] = 0

    @model_validator(mode="after")
    def _one_source_of_arrivals(self) -> BenchSpec:
        given = {"rates", "requests"} & self.model_fields_set
        if self.trace is not None and given:
            raise ValueError(f"a trace says when requests arrive, so leave out {' and '.join(sorted(given))}")
        return self
