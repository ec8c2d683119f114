"""Load tests: of a server whose delays are known, in virtual time, and of our own."""

from __future__ import annotations

import asyncio
import json
import math
import selectors
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any

import httpx
import numpy as np
import pytest

from toolkit.cli import main
from toolkit.errors import DataError, SpecError, UnsupportedError
from toolkit.jobs.bench_serve.drive import Outcome
from toolkit.jobs.bench_serve.measure import Run, highest_rate, jain, summary
from toolkit.jobs.bench_serve.run import bench, bench_serve
from toolkit.jobs.bench_serve.spec import BenchSpec, ServiceLimits
from toolkit.jobs.bench_serve.workload import Job, poisson, poisson_jobs, popularity, trace_jobs
from toolkit.serving.engine import Engine
from toolkit.serving.serve import background_server
from toolkit.serving.spec import Limits

URL = "http://fake"


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop that never waits: where there is nothing to do, its clock jumps to the next timer."""

    def __init__(self) -> None:
        super().__init__(_JumpingSelector(self))
        self.now = 0.0

    def time(self) -> float:
        return self.now


class _JumpingSelector(selectors.DefaultSelector):
    def __init__(self, loop: VirtualLoop) -> None:
        super().__init__()
        self.loop = loop

    def select(self, timeout: float | None = None) -> list[Any]:
        assert timeout is not None, "everything waits for something that never comes"
        self.loop.now += max(timeout, 0)
        return super().select(0)


class FakeServer(httpx.AsyncBaseTransport):
    """Answers one prompt after the other, each after `prefill` seconds, then a token every `step` seconds."""

    def __init__(self, prefill: float, step: float = 0.0, failing: str = "", models: tuple[str, ...] = ("m",)) -> None:
        self.prefill, self.step, self.failing, self.models = prefill, step, failing, models
        self.free_at = 0.0
        self.bodies: list[dict[str, Any]] = []
        self.running = self.most_running = 0

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        if request.url.path == "/v1/models":
            return httpx.Response(200, json={"data": [{"id": name} for name in self.models]})
        body = json.loads(await request.aread())
        self.bodies.append(body)
        if body["model"] == self.failing:
            return httpx.Response(429, json={"error": {"message": "the queue is full"}})
        self.running += 1
        self.most_running = max(self.running, self.most_running)
        now = asyncio.get_running_loop().time()
        self.free_at = max(now, self.free_at) + self.prefill
        return httpx.Response(200, stream=_Stream(self, self._answer(body, self.free_at - now)))

    async def _answer(self, body: dict[str, Any], wait: float) -> AsyncIterator[bytes]:
        yield b": a comment, as proxies send\n\n"
        yield _event({"choices": [{"index": 0, "delta": {"role": "assistant"}}]})
        await asyncio.sleep(wait)
        for at in range(body["max_tokens"]):
            await asyncio.sleep(self.step if at else 0)
            text = {"delta": {"content": "x"}} if "messages" in body else {"text": "x"}
            yield _event({"choices": [{"index": 0, "finish_reason": None, **text}]})
        self.running -= 1
        yield _event({"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": body["max_tokens"]}})
        yield b"data: [DONE]\n\n"


class _Stream(httpx.AsyncByteStream):
    def __init__(self, server: FakeServer, parts: AsyncIterator[bytes]) -> None:
        self.server, self.parts = server, parts

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self.parts


def _event(data: dict[str, Any]) -> bytes:
    return f"data: {json.dumps(data)}\n\n".encode()


def run_virtually(server: FakeServer, **fields: Any) -> list[Run]:
    spec = BenchSpec(url=URL, **{"warmup": 0, **fields})
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(bench(spec, quiet=True, transport=server))[1]


def waits(arrivals: np.ndarray, service: float) -> np.ndarray:
    """Return the waiting times of a single server, by Lindley's recursion."""
    wait = np.zeros(len(arrivals))
    for at in range(1, len(arrivals)):
        wait[at] = max(0.0, wait[at - 1] + service - (arrivals[at] - arrivals[at - 1]))
    return wait


@pytest.mark.system("distserve")
@pytest.mark.parametrize("rate", [0.3, 0.7])
def test_arrivals_at_a_server_of_constant_service_are_md1(rate):
    service = 1.0
    arrivals = poisson(rate, 200_000, seed=3)
    expected = service + rate * service**2 / (2 * (1 - rate * service))
    assert np.mean(waits(arrivals, service)) + service == pytest.approx(expected, rel=0.01)
    gaps = np.diff(arrivals)
    assert np.std(gaps) * rate == pytest.approx(1, rel=0.01), "the gaps are exponential"


@pytest.mark.system("distserve")
@pytest.mark.parametrize("chat", [False, True])
def test_measured_latencies_are_those_of_the_queue(chat):
    service, step = 1.0, 0.05
    [run] = run_virtually(
        FakeServer(service, step), rates=[0.7], requests=300, prompt_words=4, max_tokens="2-9", chat=chat
    )
    arrivals = np.array([outcome.job.at for outcome in run.outcomes])
    np.testing.assert_allclose([o.ttft for o in run.outcomes], service + waits(arrivals, service), atol=1e-6)
    np.testing.assert_allclose([o.tpot for o in run.outcomes], step, atol=1e-6)
    assert [o.tokens for o in run.outcomes] == [o.job.max_tokens for o in run.outcomes]
    found = run.numbers()
    total = sum(outcome.job.max_tokens for outcome in run.outcomes)
    ended = max(o.job.at + o.ttft + step * (o.tokens - 1) for o in run.outcomes)
    assert found["tokens_per_second"] == pytest.approx(total / ended)
    assert found["prompt_tokens_per_second"] == pytest.approx(7 * 300 / ended)
    assert found["client_delay"] == pytest.approx(0, abs=1e-6)


def test_waiting_for_a_place_counts():
    server = FakeServer(prefill=0.0, step=1.0)
    [run] = run_virtually(server, rates=[math.inf], requests=6, max_tokens=3, concurrency=2)
    assert server.most_running == 2
    assert sorted(o.ttft for o in run.outcomes) == pytest.approx([0, 0, 2, 2, 4, 4], abs=1e-6)
    assert run.numbers()["client_delay"] == pytest.approx(4)


def outcome(ttft: float, tpot: float, model: str = "m", tokens: int = 11, error: str = "") -> Outcome:
    job = Job(1.0, model, "", tokens)
    return Outcome(job, 1.0, None if error else 1 + ttft, 1 + ttft + tpot * (tokens - 1), 5, tokens, error)


def test_numbers_by_hand():
    outcomes = [outcome(0.1 * k, 0.01 * k, "ab"[k % 2]) for k in range(1, 11)] + [outcome(0, 0, "a", error="gone")]
    run = Run(2.0, outcomes, ServiceLimits(ttft=0.85, tpot=0.055, share=0.45))
    found = run.numbers()
    # The ten values 0.1, ..., 1.0: at position 0.5 * 9, 0.9 * 9 and 0.99 * 9 of them.
    assert [found["ttft"][name] for name in ("mean", "p50", "p90", "p99")] == pytest.approx([0.55, 0.55, 0.91, 0.991])
    assert found["tpot"]["p95"] == pytest.approx(0.0955)
    assert found["seconds"] == pytest.approx(1 + 1.0 + 0.1 * 10)
    assert (found["requests"], found["failed"], found["errors"]) == (11, 1, ["gone"])
    assert found["within_limits"] == pytest.approx(5 / 11), "TPOT is within for five, TTFT for eight, one failed"
    assert found["goodput"] == pytest.approx(5 / 3)
    assert highest_rate([run]) == 2.0
    speeds = {name: np.mean([11 / (0.2 * k) for k in range(1, 11) if "ab"[k % 2] == name]) for name in "ab"}
    assert found["models"]["a"]["speed"] == pytest.approx(speeds["a"])
    expected = sum(speeds.values()) ** 2 / (2 * sum(speed**2 for speed in speeds.values()))
    assert found["fairness"] == pytest.approx(expected)
    assert [found["models"][name]["requests"] for name in ("a", "b")] == [6, 5]


def test_fairness_index_by_hand():
    assert jain([3.0, 3.0, 3.0]) == pytest.approx(1)
    assert jain([5.0, 0.0, 0.0, 0.0]) == pytest.approx(1 / 4)
    assert jain([1.0, 3.0]) == pytest.approx(16 / 20)
    assert jain([]) is None
    assert summary([None]) is None


def test_goodput_falls_as_limits_get_stricter():
    [run] = run_virtually(FakeServer(1.0), rates=[0.9], requests=200, max_tokens=1)
    served = [Run(0.9, run.outcomes, ServiceLimits(ttft=limit)).numbers()["goodput"] for limit in (9, 4, 2, 1.5, 0.5)]
    assert served == sorted(served, reverse=True)
    assert served[-1] == 0 < served[-2] < served[0]
    assert highest_rate([Run(0.9, run.outcomes, ServiceLimits(ttft=0.5))]) is None


def test_failures_are_counted_and_named():
    server = FakeServer(0.0, 1.0, failing="bad", models=("good", "bad", "auto"))
    [run] = run_virtually(server, rates=[5.0], requests=40, max_tokens=2)
    found = run.numbers()
    assert {body["model"] for body in server.bodies} == {"good", "bad"}, "a router is asked only by name"
    assert found["failed"] == found["models"]["bad"]["failed"] == found["models"]["bad"]["requests"] > 0
    assert found["errors"] == ["429: the queue is full"]
    with pytest.raises(UnsupportedError, match="bad: 429: the queue is full"):
        run_virtually(server, warmup=1)
    [late] = run_virtually(FakeServer(0.0, 1.0), rates=[1.0], requests=3, max_tokens="2-9", timeout=4.5)
    slow = [o for o in late.outcomes if o.job.max_tokens > 5]
    assert slow
    assert [o.error for o in slow] == ["no whole answer within 4.5 s"] * len(slow)


def test_popularity_and_prompts():
    spec = BenchSpec(url=URL, requests=20_000, zipf=1.0, shared_words=5, prefixes=3, prompt_words="2-4", max_tokens=8)
    jobs = poisson_jobs(spec, ["a", "b", "c"], 10.0)
    counts = Counter(job.model for job in jobs)
    # Harmonic: 1 + 1/2 + 1/3 = 11/6.
    expected = np.array([6, 3, 2]) / 11
    np.testing.assert_allclose(popularity(3, 1.0), expected)
    np.testing.assert_allclose([counts[name] / 20_000 for name in "abc"], expected, atol=0.015)
    assert len({" ".join(job.prompt.split()[:5]) for job in jobs}) == 3
    assert {len(job.prompt.split()) - 5 for job in jobs} == {2, 3, 4}
    assert {job.max_tokens for job in jobs} == {8}
    again = poisson_jobs(spec, ["a", "b", "c"], 20.0)
    np.testing.assert_allclose([job.at / 2 for job in jobs], [job.at for job in again])
    assert [job.prompt for job in jobs] == [job.prompt for job in again], "a rate changes nothing but the arrivals"


def test_trace(tmp_path):
    trace = tmp_path / "trace.jsonl"
    rows = [{"at": 2, "model": "b", "prompt": "hello", "max_tokens": 3}, {"at": 0.5}]
    trace.write_text("".join(json.dumps(row) + "\n" for row in rows))
    [run] = run_virtually(FakeServer(0.25, models=("a",)), trace=str(trace), max_tokens=1)
    first, second = run.outcomes
    assert (first.job.at, first.job.model, first.first) == (0.5, "a", pytest.approx(0.75))
    assert second.job == Job(2.0, "b", "hello", 3)
    assert run.rate is None
    for row, message in [
        ({"model": "a"}, "has no 'at'"),
        ({"at": -1}, "at is -1"),
        ({"at": 1, "max_tokens": 0}, "max_tokens is 0"),
        ({"at": 1, "tokens": 3}, "unknown field 'tokens'"),
    ]:
        trace.write_text(json.dumps(row) + "\n")
        with pytest.raises(DataError, match=f"trace.jsonl:1: {message}"):
            trace_jobs(BenchSpec(url=URL, trace=str(trace)), ["a"])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"url": "localhost:8000"}, "url: expected an address such as"),
        ({"rates": [0]}, r"rates\[0\]"),
        ({"prompt_words": "9-3"}, "prompt_words: the least, 9, is more than the most, 3"),
        ({"max_tokens": "many"}, "max_tokens"),
        ({"trace": "x", "rates": [1]}, "a trace says when requests arrive, so leave out rates"),
    ],
)
def test_mistakes_in_the_spec(fields, message):
    with pytest.raises(SpecError, match=message):
        bench_serve({"url": URL, **fields}, quiet=True)


def test_no_server_is_one_line(capsys):
    assert main(["bench-serve", "http://127.0.0.1:9/v1", "-q"]) == 1
    assert capsys.readouterr().err.startswith("error: http://127.0.0.1:9: cannot be reached (")


def test_own_server(base, loras, tmp_path, capsys):
    limits = Limits(max_requests=4, page_size=4, cache_tokens=800)
    with Engine(str(base), {"plain": loras["plain"]}, limits=limits) as engine:
        with background_server(engine, api_keys=["secret"]) as url:
            options = ["--rate", "50", "--rate", "inf", "--requests", "12", "--zipf", "1", "--api-key", "secret"]
            sizes = ["--prompt-words", "2-4", "--shared-words", "3", "--max-tokens", "5", "--ttft", "60"]
            picture = tmp_path / "latency.svg"
            code = main(["bench-serve", f"{url}/v1/", *options, *sizes, "--json", "-q", "--plot", str(picture)])
            shown = capsys.readouterr()
            assert code == 0, shown.err
            assert main(["bench-serve", url, *options, *sizes, "-q"]) == 0
            table = capsys.readouterr().out
            assert main(["bench-serve", url, "-q", "--api-key", "wrong"]) == 1
            assert "answered 401: missing or wrong API key" in capsys.readouterr().err
        assert engine.scheduler.prefixes
        assert engine.scheduler.prefixes.num_hits > 0, "prompts begin alike"
    found = json.loads(shown.out)
    assert found["models"] == ["base", "plain"]
    assert [run["rate"] for run in found["runs"]] == [50, "inf"]
    for run in found["runs"]:
        assert run["failed"] == 0
        assert sum(model["tokens"] for model in run["models"].values()) == 12 * 5
        assert 0 < run["ttft"]["p50"] <= run["ttft"]["p99"] <= run["latency"]["p99"]
        assert run["within_limits"] == 1
    assert found["highest_rate_within_limits"] == "inf"
    assert "TTFT <= 60000 ms" in table
    assert "by model, all at once, milliseconds" in table
    assert picture.read_text().startswith("<?xml")
