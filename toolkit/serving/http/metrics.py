"""Prometheus metrics, with labels that take few values whatever clients send."""

from __future__ import annotations

from collections import Counter as Counts
from collections.abc import Iterator
from itertools import islice

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from toolkit.serving.engine import Engine
from toolkit.serving.http.records import Record
from toolkit.serving.routing import Routing

MOST_MODELS = 200
"""Models with series of their own; the rest share the label `other`."""

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class Metrics:
    """The metrics of one server.

    Args:
        engine: whose state is read when the metrics are asked for.
    """

    def __init__(self, engine: Engine) -> None:
        self.registry = CollectorRegistry()
        self._models: set[str] = set()
        self._requests = self._counter("requests", "HTTP requests by route and status.", "endpoint", "status")
        self._refused = self._counter(
            "refused_requests", "Requests refused because the queue was full, or came too fast."
        )
        self._answers = self._counter("answers", "Finished answers by the model that gave them.", "model")
        self._tokens = self._counter("generated_tokens", "Tokens of answers by the model that gave them.", "model")
        self._prompt_tokens = self._counter("prompt_tokens", "Tokens of prompts.")
        self._first = self._histogram("time_to_first_token_seconds", "From the request to its first token.")
        self._each = self._histogram("time_per_output_token_seconds", "Per token of an answer after its first.")
        self._whole = self._histogram("request_seconds", "From a request to the end of its response.", "endpoint")
        self.registry.register(_EngineState(engine))

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"toolkit_{name}", text, labels, registry=self.registry)

    def _histogram(self, name: str, text: str, *labels: str) -> Histogram:
        return Histogram(f"toolkit_{name}", text, labels, registry=self.registry, buckets=SECONDS)

    def observe(self, record: Record) -> None:
        """Count a request that is over."""
        self._requests.labels(record.endpoint, str(record.status)).inc()
        self._whole.labels(record.endpoint).observe(record.seconds)
        self._prompt_tokens.inc(record.prompt_tokens)
        if record.status == 429:
            self._refused.inc()
        for model, tokens in record.served:
            label = self._label(model)
            self._answers.labels(label).inc()
            self._tokens.labels(label).inc(tokens)
        if record.time_to_first_token is not None:
            self._first.observe(record.time_to_first_token)
        if record.time_per_token is not None:
            self._each.observe(record.time_per_token)

    def _label(self, model: str) -> str:
        # Only names of served models come here, but adapters come and go, and series stay.
        if model not in self._models and len(self._models) >= MOST_MODELS:
            return "other"
        self._models.add(model)
        return model

    def text(self) -> bytes:
        """Return all metrics in Prometheus' text format."""
        return generate_latest(self.registry)


class _EngineState(Collector):
    """Reads the engine's books whenever somebody asks."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def collect(self) -> Iterator[Metric]:
        """Yield the gauges of this moment."""
        engine = self.engine
        pool, adapters, prefixes = engine.scheduler.pool, engine.adapters, engine.scheduler.prefixes
        for name, text, value in (
            ("requests_running", "Answers that are being generated.", engine.num_running),
            ("requests_waiting", "Answers that wait for pages or for the router.", engine.num_waiting),
            ("pages", "Pages of the cache.", pool.num_pages),
            ("pages_free", "Pages that nobody uses just now.", pool.num_free),
            ("pages_idle", "Pages of those whose content is kept for its next use.", pool.num_idle),
            ("fine_tuning_running", "1 while a job of fine-tuning is under way.", int(engine.turns.is_open)),
            ("adapters", "Adapters that requests can ask for.", len(adapters.infos)),
            ("adapters_resident", "Adapters that are on the device.", adapters.num_resident),
            ("adapter_bytes", "Bytes of their pages.", adapters.nbytes),
        ):
            yield GaugeMetricFamily(f"toolkit_{name}", text, value)
        for name, text, value in (
            ("adapter_loads", "Adapters read from disk.", adapters.loader.num_loads),
            ("adapter_hits", "Requests that found their adapter on the device.", adapters.num_hits),
            ("adapter_evictions", "Adapters that had to leave the device.", adapters.num_evicted),
            ("trained_tokens", "Tokens for which fine-tuning computed gradients.", engine.turns.tokens),
            ("preemptions", "Running requests put back into the queue.", engine.scheduler.num_preemptions),
            ("prefix_tokens_looked_up", "Tokens of prompts that started.", prefixes.num_lookups if prefixes else 0),
            ("prefix_tokens_found", "Tokens of them that were computed already.", prefixes.num_hits if prefixes else 0),
        ):
            yield CounterMetricFamily(f"toolkit_{name}", text, value)
        yield from _router_state(engine.routing)


def _router_state(routing: Routing) -> Iterator[Metric]:
    routed = CounterMetricFamily("toolkit_routed", "Decisions of the router, and why.", labels=("expert", "reason"))
    # In the order in which experts were first chosen, so a series never changes its label.
    decisions = routing.decisions.copy()
    named = set(islice(dict.fromkeys(expert for expert, _ in decisions), MOST_MODELS))
    counts: Counts[tuple[str, str]] = Counts()
    for (expert, reason), count in decisions.items():
        counts[expert if expert in named else "other", reason] += count
    for labels, count in counts.items():
        routed.add_metric(labels, count)
    yield routed
    yield CounterMetricFamily("toolkit_router_reloads", "Routers that took another's place.", routing.num_reloads)
    yield CounterMetricFamily("toolkit_router_refusals", "Routers that were not fit to.", routing.num_refused)
    drift = GaugeMetricFamily(
        "toolkit_router_drift", "Population stability index of scores against the fit's.", labels=("measure",)
    )
    for measure, value in routing.meter.index().items():
        drift.add_metric((measure,), value)
    yield drift
    version = GaugeMetricFamily("toolkit_router_version", "1 for the router in use.", labels=("version",))
    if routing.router is not None:
        version.add_metric((routing.version,), 1)
    yield version
