"""A request whose replica dies is answered by another, once; a stream that has begun ends with an error."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from fastapi.responses import StreamingResponse

from toolkit.serving.http.middleware import BodyLimit
from toolkit.serving.replicas import forward
from toolkit.serving.replicas.asgi import Asked, Head, Part, answers
from toolkit.serving.replicas.forward import TRIES, Front, affinity

JSON = Head(200, ((b"content-type", b"application/json"),))
EVENTS = Head(200, ((b"content-type", b"text/event-stream"),))


class DiedError(Exception):
    pass


class Replicas:
    """Answers in turn: a list of parts for each request that comes; an exception among them is raised there."""

    def __init__(self, *scripts: Sequence[Part | Exception]) -> None:
        self.scripts, self.asked, self.closed = list(scripts), list[tuple[str, Asked]](), 0

    async def __call__(self, model: str, asked: Asked) -> AsyncGenerator[Part]:
        self.asked.append((model, asked))
        script = self.scripts.pop(0)
        try:
            for part in script:
                await asyncio.sleep(0)
                if isinstance(part, Exception):
                    raise part
                yield part
        finally:
            self.closed += 1


@pytest.fixture(autouse=True)
def at_once(monkeypatch):
    monkeypatch.setattr(forward, "PAUSE", 0.0)


def ask(replicas: Callable[..., Any], method: str = "POST", path: str = "/v1/completions", **options: Any) -> Any:
    async def go() -> httpx.Response:
        front = Front(replicas, (DiedError,))
        async with httpx.AsyncClient(transport=httpx.ASGITransport(front), base_url="http://x") as client:
            return await client.request(method, path, **options)

    return asyncio.run(go())


def test_a_whole_answer_is_passed_on():
    replicas = Replicas([JSON, b'{"a": ', b"1}"])
    response = ask(replicas, json={"model": "sort"}, headers={"authorization": "Bearer k"}, params={"q": "1"})
    assert (response.status_code, response.json()) == (200, {"a": 1})
    assert response.headers["x-toolkit-attempts"] == "1"
    ((model, asked),) = replicas.asked
    assert (model, asked.method, asked.path, asked.query) == ("sort", "POST", "/v1/completions", b"q=1")
    assert dict(asked.headers)[b"authorization"] == b"Bearer k"
    assert json.loads(asked.body) == {"model": "sort"}


@pytest.mark.parametrize("at", [0, 1, 2])
def test_a_whole_answer_comes_from_another_replica_however_far_the_first_was(at):
    first: list[Part | Exception] = [JSON, b'{"a": 0', b"}"]
    replicas = Replicas([*first[:at], DiedError()], [JSON, b'{"a": 1}'])
    response = ask(replicas, json={})
    assert (response.status_code, response.json()) == (200, {"a": 1})
    assert response.headers["x-toolkit-attempts"] == "2"
    assert replicas.closed == 2


def test_a_stream_that_has_not_begun_comes_from_another_replica():
    replicas = Replicas([EVENTS, DiedError()], [EVENTS, b"data: 1\n\n", b"data: [DONE]\n\n"])
    assert ask(replicas, json={}).text == "data: 1\n\ndata: [DONE]\n\n"


def test_a_stream_that_has_begun_ends_with_an_error_and_is_not_given_twice():
    replicas = Replicas([EVENTS, b"data: 1\n\n", DiedError()], [EVENTS, b"data: 1\n\n"])
    text = ask(replicas, json={}).text
    first, last, rest = text.split("\n\n")
    assert (first, rest) == ("data: 1", "")
    error = json.loads(last.removeprefix("data: "))["error"]
    assert (error["code"], error["type"]) == ("replica_died", "server_error")
    assert len(replicas.asked) == 1


def test_an_error_of_the_server_itself_is_no_reason_to_ask_again():
    replicas = Replicas([JSON, ValueError("broken")], [JSON, b"{}"])
    response = ask(replicas, json={})
    assert (response.status_code, response.json()["error"]["code"]) == (500, "internal_error")
    assert len(replicas.asked) == 1
    refused = Replicas([Head(429, ((b"retry-after", b"3"),)), b"{}"])
    response = ask(refused, json={})
    assert (response.status_code, response.headers["retry-after"]) == (429, "3")


def test_a_request_that_kills_every_replica_is_given_up():
    replicas = Replicas(*[[DiedError()]] * TRIES)
    response = ask(replicas, json={})
    assert (response.status_code, response.json()["error"]["code"]) == (503, "replica_died")
    assert len(replicas.asked) == TRIES


@pytest.mark.parametrize(
    ("method", "path", "hint"),
    [
        ("GET", "/metrics", "Ray's dashboard"),
        ("POST", "/v1/adapters", "--adapter-folder"),
        ("DELETE", "/v1/adapters/a", "--adapter-folder"),
        ("POST", "/v1/load_lora_adapter", "--adapter-folder"),
    ],
)
def test_what_one_replica_cannot_answer_for_all(method, path, hint):
    replicas = Replicas()
    response = ask(replicas, method, path)
    assert response.status_code == 501
    assert hint in response.json()["error"]["message"]
    assert replicas.asked == []


def test_the_list_of_adapters_can_be_read():
    assert ask(Replicas([JSON, b"[]"]), "GET", "/v1/adapters").json() == []


def test_which_model_a_request_is_for():
    def asked(body: Any, method: str = "POST") -> Asked:
        return Asked(method, "/v1/completions", b"", (), body if isinstance(body, bytes) else json.dumps(body).encode())

    assert affinity(asked({"model": "sort"})) == "sort"
    assert affinity(asked({"model": "a:0.6+b:0.4"})) == "a:0.6+b:0.4"
    assert affinity(asked({"model": "base", "adapters": [{"name": "b"}, {"name": "a", "weight": 2}]})) == "a+b"
    for none in ({"model": "base"}, {"model": "auto"}, {"model": 3}, {}, [], b"{", b""):
        assert affinity(asked(none)) == ""
    assert affinity(asked({"model": "sort"}, "GET")) == ""


def test_a_body_that_is_too_large_reaches_no_replica():
    async def go() -> httpx.Response:
        app = BodyLimit(Front(Replicas(), ()), 10)

        async def pieces() -> AsyncGenerator[bytes]:
            for _ in range(5):
                yield b"12345"

        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://x") as client:
            return await client.post("/v1/completions", content=pieces(), headers={"content-length": "5"})

    response = asyncio.run(go())
    assert response.status_code == 413
    assert "larger than the 10 bytes" in response.json()["error"]["message"]


def application() -> tuple[FastAPI, list[str]]:
    app, seen = FastAPI(), list[str]()

    @app.post("/echo")
    async def echo(body: dict[str, Any]) -> dict[str, Any]:
        return body

    @app.get("/count")
    async def count() -> StreamingResponse:
        async def lines() -> AsyncGenerator[str]:
            try:
                for number in range(1000):
                    yield f"data: {number}\n\n"
                    await asyncio.sleep(0)
            finally:
                seen.append("over")

        return StreamingResponse(lines(), media_type="text/event-stream")

    @app.get("/fails")
    async def fails() -> None:
        raise ValueError("broken")

    return app, seen


def test_an_application_is_asked_without_a_socket():
    app, seen = application()

    async def go() -> None:
        json_type = ((b"content-type", b"application/json"),)
        head, body = [part async for part in answers(app, Asked("POST", "/echo", b"", json_type, b'{"a": 1}'))]
        assert isinstance(head, Head)
        assert (head.status, head.is_stream, body) == (200, False, b'{"a":1}')
        head, *events = [part async for part in answers(app, Asked("GET", "/count", b"", (), b""))]
        assert isinstance(head, Head)
        assert head.is_stream
        assert events[:2] == [b"data: 0\n\n", b"data: 1\n\n"]
        assert len(events) == 1000
        with pytest.raises(ValueError, match="broken"):
            async for _ in answers(app, Asked("GET", "/fails", b"", (), b"")):
                pass
        seen.clear()
        stream = answers(app, Asked("GET", "/count", b"", (), b""))
        await anext(stream)
        await anext(stream)
        assert seen == []
        await stream.aclose()
        assert seen == ["over"], "the application learns that nobody listens"

    asyncio.run(go())
