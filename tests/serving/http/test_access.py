"""Keys, limits, request ids, logs and metrics."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator

import httpx
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from toolkit.serving.engine import Engine
from toolkit.serving.http.errors import ApiError
from toolkit.serving.http.limits import Pace, Queue
from toolkit.serving.http.metrics import MOST_MODELS, Metrics
from toolkit.serving.http.records import JsonLines, Record
from toolkit.serving.loop import EngineLoop
from toolkit.serving.serve import background_server
from toolkit.serving.spec import Limits

ASK = {"model": "base", "prompt": "x", "max_tokens": 3, "ignore_eos": True}


def client_of(url: str) -> httpx.Client:
    return httpx.Client(base_url=url, trust_env=False, timeout=60)


@pytest.fixture
def narrow(base) -> Iterator[tuple[Engine, httpx.Client]]:
    """A server that runs one answer and lets one more wait."""
    with (
        Engine(str(base), limits=Limits(max_requests=1)) as engine,
        background_server(engine, max_waiting=1, max_body=1000) as url,
        client_of(url) as http,
    ):
        yield engine, http


def test_one_of_several_keys_opens_everything_but_health(base):
    keys = ["first", "s\xe9cond"]
    with (
        Engine(str(base)) as engine,
        background_server(engine, api_keys=keys, adapter_roots=["/"]) as url,
        client_of(url) as http,
    ):
        paths = ["/v1/models", "/v1/adapters", "/metrics", "/openapi.json", "/docs", "/nothing"]
        posts = ["/v1/completions", "/v1/chat/completions", "/v1/embeddings", "/v1/adapters"]
        posts += ["/v1/load_lora_adapter", "/v1/unload_lora_adapter"]
        for path in paths + posts:
            for header in ({}, {"authorization": "Bearer wrong"}, {"authorization": "first"}, {"x-api-key": "first"}):
                response = http.request("POST" if path in posts else "GET", path, headers=header)
                assert (response.status_code, response.headers["www-authenticate"]) == (401, "Bearer"), path
                assert response.json()["error"]["code"] == "invalid_api_key"
        assert http.delete("/v1/adapters/x").status_code == 401
        for key in keys:
            assert http.get("/v1/models", headers={b"authorization": f"bearer {key}".encode()}).status_code == 200
        assert http.get("/health").json() == {"status": "ok"}
        assert http.get("/ready").json() == {"status": "ready"}
        with openai.OpenAI(base_url=f"{url}/v1", api_key="wrong") as client, pytest.raises(openai.AuthenticationError):
            client.models.list()
        with openai.OpenAI(base_url=f"{url}/v1", api_key="first") as client:
            assert [m.id for m in client.models.list()] == ["base"]


def test_a_full_queue_is_429_with_a_time_to_come_back(narrow, monkeypatch):
    engine, http = narrow
    run = engine.runner.run
    monkeypatch.setattr(engine.runner, "run", lambda step: (time.sleep(0.01), run(step))[1])
    long = ASK | {"max_tokens": 200, "stream": True}
    with http.stream("POST", "/v1/completions", json=long) as one, http.stream("POST", "/v1/completions", json=long):
        lines = one.iter_lines()  # held: without it the stream would be closed
        next(lines)
        assert (engine.num_running, engine.num_waiting) == (1, 1)
        for path, body in (
            ("/v1/completions", ASK),
            ("/v1/chat/completions", {"model": "base", "messages": [{"role": "user", "content": "x"}]}),
            ("/v1/embeddings", {"model": "base", "input": "x"}),
        ):
            response = http.post(path, json=body)
            assert response.status_code == 429, path
            assert response.json()["error"]["type"] == "rate_limit_error"
            assert response.json()["error"]["code"] == "queue_full"
            assert "2 requests run or wait, and at most 2 may" in response.json()["error"]["message"]
            assert 1 <= int(response.headers["retry-after"]) <= 60
        assert http.get("/ready").status_code == 503
        assert http.get("/health").status_code == 200
        with (
            openai.OpenAI(base_url=f"{http.base_url}/v1", api_key="any", max_retries=0) as client,
            pytest.raises(openai.RateLimitError),
        ):
            client.completions.create(model="base", prompt="x")
        with openai.OpenAI(base_url=f"{http.base_url}/v1", api_key="any", max_retries=8) as patient:
            assert patient.completions.create(model="base", prompt="x", max_tokens=2).choices
    assert http.get("/ready").status_code == 200
    refused = samples(http.get("/metrics").text)["toolkit_refused_requests_total",]
    assert refused >= 4, "the patient client may have been refused, too"


def test_more_answers_than_ever_fit_is_no_reason_to_come_back(narrow):
    _, http = narrow
    response = http.post("/v1/completions", json=ASK | {"n": 3})
    assert response.status_code == 400
    assert "3 answers in one request are more than the 2 that this server takes" in response.json()["error"]["message"]
    assert http.post("/v1/completions", json=ASK | {"n": 2}).status_code == 200


@pytest.mark.parametrize(
    ("seconds", "expected"), [([], 1), ([5.0], 1), ([0, 0.1, 0.2], 1), ([0, 7, 13], 7), ([0, 900], 60)]
)
def test_retry_after_is_the_pace_of_the_last_answers(seconds, expected, monkeypatch):
    queue = Queue(1, 1)
    for at in seconds:
        monkeypatch.setattr(time, "monotonic", lambda at=at: at)
        queue.finished()
    assert queue.retry_after() == expected


def test_each_key_has_a_pace_of_its_own(base):
    with (
        Engine(str(base)) as engine,
        background_server(engine, api_keys=["a", "b"], requests_per_minute=3) as url,
        client_of(url) as http,
    ):
        for key in "ab":
            head = {"authorization": f"Bearer {key}"}
            codes = [http.post("/v1/completions", json=ASK, headers=head).status_code for _ in range(3)]
            late = http.post("/v1/completions", json=ASK, headers=head)
            assert (codes, late.status_code) == ([200] * 3, 429)
            assert (late.json()["error"]["code"], late.headers["retry-after"]) == ("rate_limit_exceeded", "20")
            assert http.get("/v1/models", headers=head).status_code == 200


def test_pace_over_time(monkeypatch):
    """Against a count: 6 at once, then one more every 10 seconds, never more than 6."""
    pace, now, taken = Pace(6), 0.0, []
    monkeypatch.setattr(time, "monotonic", lambda: now)
    for now in [0.0] * 8 + [9.0, 10.0, 11.0, 30.0, 30.0, 30.0] + [1000.0] * 7:
        try:
            pace.take("key")
            taken.append(now)
        except ApiError:
            pass
    assert taken == [0.0] * 6 + [10.0, 30.0, 30.0] + [1000.0] * 6


def test_large_bodies_are_refused_before_they_are_read(narrow):
    _, http = narrow
    fits = json.dumps(ASK | {"user": ""}).encode()
    fits = json.dumps(ASK | {"user": "u" * (1000 - len(fits))}).encode()
    head = {"content-type": "application/json"}
    assert len(fits) == 1000
    for content, status in ((fits, 200), (fits + b" ", 413)):
        assert http.post("/v1/completions", content=content, headers=head).status_code == status

    def pieces() -> Iterator[bytes]:
        yield fits
        yield b" " * 500

    response = http.post("/v1/completions", content=pieces(), headers=head)
    assert (response.status_code, response.json()["error"]["message"][:35]) == (
        413,
        "the body is larger than the 1,000 b",
    )


@pytest.mark.parametrize("body", ["[" * 900, '{"n":' + "1" * 900 + "}", '{"prompt": "\\ud800"}', "\xff", "nul", ""])
def test_bodies_that_break_parsers(body, narrow):
    _, http = narrow
    response = http.post("/v1/completions", content=body, headers={"content-type": "application/json"})
    assert response.status_code == 400
    assert response.json()["error"]["message"]


def test_request_ids_are_the_clients_or_new(http, client):
    first, second = (http.get("/v1/models").headers["x-request-id"] for _ in range(2))
    assert first != second
    for given, kept in (("mine-7", True), ("a b", False), ("x" * 129, False), ('"}', False)):
        assert (http.get("/health", headers={"x-request-id": given}).headers["x-request-id"] == given) == kept
    answer = http.post("/v1/completions", json=ASK, headers={"x-request-id": "mine-8"})
    assert (answer.headers["x-request-id"], answer.json()["id"]) == ("mine-8", "cmpl-mine-8")
    assert http.get("/nothing").headers["x-request-id"]
    found = client.completions.create(model="base", prompt="x", max_tokens=1)
    assert found.id == f"cmpl-{found._request_id}"


def test_a_fault_of_the_server_has_its_request_id(http, engine, monkeypatch):
    monkeypatch.setattr(engine, "submit", lambda *args, **kwargs: 1 / 0)
    response = http.post("/v1/completions", json=ASK, headers={"x-request-id": "mine-9"})
    assert (response.status_code, response.headers["x-request-id"]) == (500, "mine-9")


def test_log_lines(http, caplog):
    caplog.set_level(logging.INFO, "toolkit.serving.access")
    secret = "never to be logged"
    http.post("/v1/completions", json=ASK | {"model": "dora", "prompt": secret}, headers={"x-request-id": "mine"})
    http.get(f"/{secret}")
    lines = [json.loads(JsonLines().format(record)) for record in caplog.records if record.getMessage() == "request"]
    answered, unknown = lines[-2:]
    assert secret not in json.dumps(lines)
    seconds, first = answered.pop("seconds"), answered.pop("time_to_first_token")
    assert 0 < first <= seconds < 60
    assert answered.pop("time").endswith("Z")
    assert answered == {
        "level": "info",
        "logger": "toolkit.serving.access",
        "event": "request",
        "request_id": "mine",
        "method": "POST",
        "endpoint": "/v1/completions",
        "status": 200,
        "model": "dora",
        "models_used": ["dora"],
        "prompt_tokens": len(secret),
        "tokens": 3,
    }
    assert (unknown["endpoint"], unknown["status"]) == ("other", 404)


def test_a_traceback_stays_one_line():
    try:
        raise ValueError("two\nlines")
    except ValueError as error:
        record = logging.LogRecord(
            "x", logging.ERROR, "", 0, "bad\nthing", (), (ValueError, error, error.__traceback__)
        )
    line = JsonLines().format(record)
    assert "\n" not in line
    assert json.loads(line)["traceback"].endswith("ValueError: two\nlines")


def samples(text: str) -> dict[tuple[str, ...], float]:
    return {
        (sample.name, *sorted(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_metrics_count_what_was_served(base, loras):
    with (
        Engine(str(base), {"dora": loras["dora"], "few": loras["few"]}) as engine,
        background_server(engine) as url,
        client_of(url) as http,
    ):
        for model, count in (("dora", 3), ("dora", 5), ("few", 2)):
            http.post("/v1/completions", json=ASK | {"model": model, "max_tokens": count})
        http.post("/v1/completions", json=ASK | {"n": 2, "stream": True})
        http.post("/v1/completions", json=ASK | {"model": "nobody"})
        for i in range(20):
            http.get(f"/wander/{i}")
            http.get(f"/v1/models/wander{i}")
        response = http.get("/metrics")
        assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
        found = samples(response.text)
    expected = {
        ("toolkit_generated_tokens_total", "dora"): 8,
        ("toolkit_generated_tokens_total", "few"): 2,
        ("toolkit_generated_tokens_total", "base"): 6,
        ("toolkit_answers_total", "dora"): 2,
        ("toolkit_answers_total", "base"): 2,
        ("toolkit_prompt_tokens_total",): 4,
        ("toolkit_requests_total", "/v1/completions", "200"): 4,
        ("toolkit_requests_total", "/v1/completions", "404"): 1,
        ("toolkit_requests_total", "404", "other"): 20,
        ("toolkit_requests_total", "/v1/models/{name}", "404"): 20,
        ("toolkit_time_to_first_token_seconds_count",): 4,
        ("toolkit_time_per_output_token_seconds_count",): 3,
        ("toolkit_requests_running",): 0,
        ("toolkit_requests_waiting",): 0,
        ("toolkit_pages",): engine.scheduler.pool.num_pages,
        ("toolkit_pages_free",): engine.scheduler.pool.num_pages,
        ("toolkit_adapters",): 2,
        ("toolkit_adapters_resident",): 2,
        ("toolkit_adapter_bytes",): engine.adapters.nbytes,
        ("toolkit_adapter_loads_total",): 2,
    }
    assert {key: found.get((key[0], *sorted(key[1:]))) for key in expected} == expected
    assert "wander" not in response.text


def test_series_are_bounded_however_many_adapters_come(engine):
    metrics = Metrics(engine)
    for i in range(MOST_MODELS + 50):
        record = Record("id", "POST", status=200, tokens=2, served=[(f"adapter{i}", 2)])
        metrics.observe(record)
    found = samples(metrics.text().decode())
    series = [key for key in found if key[0] == "toolkit_generated_tokens_total"]
    assert len(series) == MOST_MODELS + 1
    assert found["toolkit_generated_tokens_total", "other"] == 100


def test_health_tells_that_the_engine_is_gone(base, monkeypatch):
    loops = []
    start = EngineLoop.start
    monkeypatch.setattr(EngineLoop, "start", lambda loop: (loops.append(loop), start(loop)))
    with Engine(str(base)) as engine, background_server(engine) as url, client_of(url) as http:
        assert http.get("/health").status_code == 200
        loops[0].stop()
        for path in ("/health", "/ready"):
            response = http.get(path)
            assert (response.status_code, response.json()["error"]["message"]) == (503, "the engine has stopped")
