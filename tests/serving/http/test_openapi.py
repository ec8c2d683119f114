"""The OpenAPI document is true: of what the server answers, of what it takes and of what it refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings

from tests.serving.http.described import Document
from tests.serving.test_server import word_router
from toolkit.serving.engine import Engine
from toolkit.serving.http.tools import TaggedCalls
from toolkit.serving.serve import background_server
from toolkit.serving.server import Access, build_app
from toolkit.serving.spec import Limits

SAY = [{"role": "user", "content": "hi"}]
JSON = {"content-type": "application/json"}
SHORT = {"max_tokens": 4, "temperature": 0}
TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}]


@pytest.fixture(scope="module")
def served(base, loras) -> Iterator[tuple[Engine, str, Document]]:
    """A server that takes few, short, slow requests, and needs a key."""
    root = loras["plain"].parent
    limits = Limits(max_requests=4, page_size=4, max_batch_tokens=64, cache_tokens=800, default_max_tokens=8)
    names = {name: loras[name] for name in ("plain", "wide")}
    with Engine(str(base), names, word_router(base), limits=limits) as engine:
        access = {"adapter_roots": [root], "max_body": 20_000, "max_waiting": 4}
        with background_server(engine, api_key="secret", **access) as url:
            headers = {"authorization": "Bearer secret"}
            yield engine, url, Document(httpx.get(f"{url}/openapi.json", headers=headers, trust_env=False).json())


@pytest.fixture
def http(served) -> Iterator[httpx.Client]:
    _, url, document = served
    with document.client(url, headers={"authorization": "Bearer secret"}) as found:
        yield found


def test_it_is_a_document_of_its_own_standard(served):
    """Against the dialect that OpenAPI 3.1 names: every schema of it is one."""
    _, _, document = served
    assert document.document["openapi"].startswith("3.1")
    for schema in document.document["components"]["schemas"].values():
        jsonschema.Draft202012Validator.check_schema(schema)
    assert "HTTPValidationError" not in document.document["components"]["schemas"]
    operations = [op for item in document.document["paths"].values() for op in item.values()]
    assert len({op["operationId"] for op in operations}) == len(operations)


def test_a_server_without_keys_asks_for_none(base):
    with Engine(str(base)) as engine:
        free = build_app(engine).openapi()
        keyed = build_app(engine, Access(api_keys=["x"])).openapi()
    assert "securitySchemes" not in free["components"]
    for path, item in keyed["paths"].items():
        for method, operation in item.items():
            guarded = path not in ("/health", "/ready")
            assert ("security" in operation, "401" in operation["responses"]) == (guarded, guarded)
            assert "401" not in free["paths"][path][method]["responses"]


def completions() -> Iterator[dict[str, Any]]:
    """Bodies whose answers have every part that an answer can have."""
    ask = {"model": "base", "prompt": "once", **SHORT}
    yield ask
    yield ask | {"model": "auto"}
    yield ask | {"model": "auto", "prompt": ["wide", "x"], "n": 2}
    yield ask | {"model": "plain:0.5+wide", "logprobs": 2, "echo": True}
    yield ask | {"max_tokens": 0, "logprobs": 0, "echo": True}
    yield ask | {"logit_bias": {"97": -100}, "seed": 3, "stop": ["q"], "temperature": 1.0, "max_tokens": 3.0}
    yield ask | {"n": None, "user": None, "stop": None, "logprobs": None, "best_of": 1}


def chats() -> Iterator[dict[str, Any]]:
    ask = {"model": "base", "messages": SAY, **SHORT}
    yield ask
    yield ask | {"model": "auto", "logprobs": True, "top_logprobs": 2}
    yield ask | {"n": 2, "messages": [{"role": "developer", "content": [{"type": "text", "text": "x"}]}, *SAY]}


@pytest.mark.parametrize(
    ("field", "value"),
    [("max_tokens", "3"), ("max_tokens", 3.5), ("temperature", True), ("stream", "yes"), ("echo", 1), ("model", 1)],
)
def test_types_are_json_s_own(field, value, http):
    """What the document calls a number is none when it is a text."""
    response = http.post("/v1/completions", json={"model": "base", "prompt": "x", field: value})
    assert (response.status_code, response.json()["error"]["param"]) == (400, field)


@pytest.mark.parametrize("stream", [False, True])
def test_answers(stream, http):
    more: dict[str, Any] = {"stream": True, "stream_options": {"include_usage": True}} if stream else {}
    for path, bodies in (("/v1/completions", completions()), ("/v1/chat/completions", chats())):
        for body in bodies:
            response = http.post(path, json=body | more)
            assert response.status_code == 200, response.text


def test_calls_of_tools_are_described(http, served, monkeypatch):
    """What the model calls is put into its mouth; how the server writes it is its own."""
    engine, _, _ = served
    monkeypatch.setattr("toolkit.serving.http.answers.call_reader", lambda template: TaggedCalls())
    monkeypatch.setattr(engine.tokenizer, "chat_template", "{{ tools }}{{ messages[0].content }}")
    call = list(b'<tool_call>{"name": "look", "arguments": {"at": 1}}</tool_call>')
    monkeypatch.setattr(engine.sampler, "sample", lambda requests, logits: [call[len(r.output)] for r in requests])
    body = {"model": "base", "messages": SAY, "tools": TOOLS, "max_tokens": len(call)}
    whole = http.post("/v1/chat/completions", json=body).json()
    assert whole["choices"][0]["message"]["tool_calls"][0]["function"]["name"] == "look"
    streamed = http.post("/v1/chat/completions", json=body | {"stream": True}).text
    assert '"tool_calls": [{"index": 0' in streamed


def test_everything_else(http, served, monkeypatch, loras):
    engine, _, document = served

    def ask(status: int, method: str, path: str, json: Any = None, **options: Any) -> None:
        response = http.request(method, path, json=json, **options)
        assert response.status_code == status, f"{method} {path}: {response.text}"

    for path in (
        "/v1/models",
        "/v1/models/plain",
        "/v1/adapters",
        "/v1/adapters/plain",
        "/v1/router",
        "/health",
        "/ready",
        "/metrics",
    ):
        ask(200, "GET", path)
    for form in ("float", "base64"):
        ask(200, "POST", "/v1/embeddings", {"model": "plain", "input": ["x", [1, 2]], "encoding_format": form})
    for name in ("models", "adapters"):
        ask(404, "GET", f"/v1/{name}/absent")
    ask(201, "POST", "/v1/adapters", {"name": "new", "path": "few"})
    ask(200, "POST", "/v1/adapters", {"name": "new"})
    ask(400, "POST", "/v1/adapters", {"name": "a+b", "path": "few"})
    ask(403, "POST", "/v1/adapters", {"name": "out", "path": "/"})
    ask(404, "POST", "/v1/adapters", {"name": "out", "path": "absent"})
    ask(200, "DELETE", "/v1/adapters/new")
    ask(404, "DELETE", "/v1/adapters/new")
    ask(409, "DELETE", "/v1/adapters/plain")
    ask(200, "POST", "/v1/load_lora_adapter", {"lora_name": "new", "lora_path": "few"})
    ask(400, "POST", "/v1/load_lora_adapter", {"lora_name": "new", "lora_path": "few"})
    ask(200, "POST", "/v1/unload_lora_adapter", {"lora_name": "new"})
    ask(404, "POST", "/v1/unload_lora_adapter", {"lora_name": "new"})
    posts = [path for path, item in document.document["paths"].items() if "post" in item]
    for path in posts:
        ask(400, "POST", path, {"unknown": 1})
        ask(413, "POST", path, {"prompt": "x" * 20_000})
        ask(401, "POST", path, {}, headers={"authorization": "Bearer wrong"})
    ask(404, "GET", "/nothing")
    ask(405, "PUT", "/v1/models")
    assert http.request("PUT", "/v1/adapters").headers["allow"] == "GET, POST"
    assert http.request("PUT", "/v1/adapters/plain").headers["allow"] == "DELETE, GET"
    timed_out = {"model": "base", "prompt": "x", "timeout": 1e-6, "ignore_eos": True}
    ask(504, "POST", "/v1/completions", timed_out)
    ask(200, "POST", "/v1/completions", timed_out | {"stream": True})
    ask(
        429,
        "POST",
        "/v1/completions",
        {"model": "base", "prompt": ["x"] * 8, "max_tokens": 1} | fill(engine, monkeypatch),
    )
    ask(503, "GET", "/ready")
    answered = {(method, path) for method, path, _, _ in document.seen}
    assert answered == {(m.upper(), p) for p, item in document.document["paths"].items() for m in item}
    statuses = {status for _, _, status, _ in document.seen}
    assert statuses == {200, 201, 400, 401, 403, 404, 409, 413, 429, 503, 504}


def fill(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Let the queue seem full; returns nothing that a body needs."""
    monkeypatch.setattr(type(engine), "num_waiting", property(lambda self: 8))
    return {}


@pytest.mark.parametrize("phase", [pytest.param("coverage", marks=pytest.mark.slow), "fuzzing,stateful"])
def test_schemathesis_finds_nothing(phase, served, tmp_path):
    """Its own command, with the values at every bound and beside it, and with some of its own."""
    _, url, _ = served
    command = [str(Path(sys.executable).with_name("schemathesis")), "run", f"{url}/openapi.json", "--phases", phase]
    command += ["-H", "Authorization: Bearer secret", "-n", "6", "--seed", "1", "--generation-deterministic"]
    # Not all that fits the schema is taken: which models there are, and what fields mean together, is not in it.
    command += [
        "--exclude-checks",
        "positive_data_acceptance",
        "--no-color",
        "--warnings",
        "off",
        "--continue-on-failure",
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]


SLOW = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.filter_too_much]
BODIES = ["/v1/completions", "/v1/chat/completions", "/v1/embeddings"]


@pytest.mark.parametrize("path", BODIES)
def test_bodies_that_fit_are_answered_as_described(path, served, http):
    """For a model that is there, so that more is met than the check of names."""
    engine, _, document = served
    operation = schemathesis.openapi.from_dict(document.document)[path]["POST"]

    @settings(max_examples=10, derandomize=True, database=None, deadline=None, suppress_health_check=SLOW)
    @given(operation.as_strategy())
    def ask(case: schemathesis.Case) -> None:
        assert isinstance(case.body, dict)
        asked = case.body | {"model": "base", "adapters": None, "timeout": None}
        assert http.post(path, content=json.dumps(asked), headers=JSON).status_code in (200, 400, 429), asked

    ask()
    engine.check()
