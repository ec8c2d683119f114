"""The server as its users meet it: through OpenAI's own client, and through bad requests."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import openai
import pytest

from tests import tiny
from tests.serving.test_engine import same_but_for_ties
from toolkit.errors import OutputError
from toolkit.routing.embedding import EmbeddingSpec
from toolkit.routing.router import Router
from toolkit.serving.engine import Engine
from toolkit.serving.serve import background_server
from toolkit.serving.spec import Limits

MESSAGES = [{"role": "user", "content": "Say something."}]


def word_router(base: Path) -> Router:
    """A router that any prompt with the word wide goes to `wide`, else to `plain`; its vectors are made by hand."""
    import numpy as np

    def embed(texts):
        return np.array([[1.0, 0.0] if "wide" in text else [0.0, 1.0] for text in texts], np.float32)

    state = {
        "center": np.zeros(2, np.float32),
        "whitening": np.eye(2, dtype=np.float32),
        "centroids": np.eye(2, dtype=np.float32),
    }
    return Router("centroid", ["wide", "plain"], state, EmbeddingSpec(model="by hand"), embed)


@pytest.fixture(scope="module")
def engine(base, loras):
    engine = Engine(
        str(base), loras, word_router(base), limits=Limits(max_requests=4, page_size=4, max_batch_tokens=64)
    )
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def url(engine):
    with background_server(engine) as address:
        yield address


@pytest.fixture
def client(url):
    with openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0) as found:
        yield found


@pytest.fixture
def http(url):
    with httpx.Client(base_url=url, trust_env=False, timeout=60) as found:
        yield found


def expected_text(engine, base, loras, name: str, prompt: str, count: int) -> str:
    ids = engine.tokenizer.encode(prompt)
    model = tiny.load_merged(base, loras.get(name))
    return engine.tokenizer.decode(tiny.greedy(model, ids, count), skip_special_tokens=True)


def test_models(client, loras):
    assert [m.id for m in client.models.list()] == ["base", *loras, "auto"]


@pytest.mark.parametrize("name", ["base", "dora", "rslora"])
def test_completion_equals_transformers_with_the_adapter_merged(name, client, engine, base, loras):
    answer = client.completions.create(
        model=name, prompt="Once upon a time", max_tokens=12, temperature=0, extra_body={"ignore_eos": True}
    )
    assert answer.choices[0].text == expected_text(engine, base, loras, name, "Once upon a time", 12)
    assert answer.choices[0].finish_reason == "length"
    assert answer.model == name
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len("Once upon a time"), 12)


def test_chat_equals_the_completion_of_its_rendered_prompt(client, engine):
    answer = client.chat.completions.create(model="wide", messages=MESSAGES, max_tokens=9, temperature=0)
    prompt = engine.tokenizer.apply_chat_template(MESSAGES, tokenize=True, add_generation_prompt=True)["input_ids"]
    same = client.completions.create(model="wide", prompt=prompt, max_tokens=9, temperature=0)
    assert answer.choices[0].message.content == same.choices[0].text
    assert answer.choices[0].message.role == "assistant"


def test_streams_put_together_are_the_answers(client):
    for asked in ({"temperature": 0}, {"temperature": 1.0, "seed": 5}):
        whole = client.chat.completions.create(model="plain", messages=MESSAGES, max_tokens=20, **asked)
        stream = client.chat.completions.create(
            model="plain",
            messages=MESSAGES,
            max_tokens=20,
            stream=True,
            stream_options={"include_usage": True},
            **asked,
        )
        chunks = list(stream)
        assert chunks[0].choices[0].delta.role == "assistant"
        text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
        assert text == whole.choices[0].message.content
        assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == whole.choices[0].finish_reason
        assert chunks[-1].usage == whole.usage
    parts = client.completions.create(model="plain", prompt="abc", max_tokens=20, temperature=0, stream=True)
    whole = client.completions.create(model="plain", prompt="abc", max_tokens=20, temperature=0)
    assert "".join(c.choices[0].text for c in parts) == whole.choices[0].text


def test_auto_says_what_it_chose(client):
    for text, expert in (("the wide one", "wide"), ("the other", "plain")):
        messages = [{"role": "user", "content": text}]
        answer = client.chat.completions.create(model="auto", messages=messages, max_tokens=8, temperature=0)
        own = client.chat.completions.create(model=expert, messages=messages, max_tokens=8, temperature=0)
        assert answer.model == expert
        assert answer.routing["expert"] == expert
        assert set(answer.routing["scores"]) == {"wide", "plain"}
        assert answer.choices[0].message.content == own.choices[0].message.content
        chunks = list(
            client.chat.completions.create(model="auto", messages=messages, max_tokens=8, temperature=0, stream=True)
        )
        assert {c.model for c in chunks} == {expert}


def test_many_at_once_through_http_equal_each_alone(url, engine, base, loras):
    names = ["base", *loras, "auto"]
    prompts = [f"{name} number {i} " * (1 + i % 3) for i, name in enumerate(names * 3)]
    answers: dict[int, dict] = {}

    def ask(i: int) -> None:
        body = {
            "model": names[i % len(names)],
            "prompt": prompts[i],
            "max_tokens": 10,
            "temperature": 0,
            "ignore_eos": True,
        }
        answers[i] = httpx.post(f"{url}/v1/completions", json=body, timeout=120, trust_env=False).json()

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, prompt in enumerate(prompts):
        name = answers[i]["model"]
        assert names[i % len(names)] in (name, "auto")
        ids = engine.tokenizer.encode(prompt)
        model = tiny.load_merged(base, loras.get(name))
        expected = tiny.greedy(model, ids, 10)
        got = answers[i]["choices"][0]["text"]
        assert got == engine.tokenizer.decode(expected, skip_special_tokens=True) or not same_but_for_ties(
            [0], [1], model, ids
        )


BAD = {
    "unknown model": ({"model": "nobody", "prompt": "x"}, 404, "model_not_found", "no model 'nobody' (served: base, "),
    "over-long prompt": ({"model": "base", "prompt": "x" * 300}, 400, "context_length_exceeded", "300 prompt tokens"),
    "empty prompt": ({"model": "base", "prompt": ""}, 400, None, "the prompt is empty"),
    "no prompt": ({"model": "base"}, 400, None, "prompt: Field required"),
    "not served": (
        {"model": "base", "prompt": "x", "logprobs": 2},
        400,
        None,
        "logprobs: not supported by this server",
    ),
    "two answers": ({"model": "base", "prompt": "x", "n": 2}, 400, None, "n: Input should be 1"),
    "bad temperature": ({"model": "base", "prompt": "x", "temperature": -1}, 400, None, "temperature: Input should be"),
    "no tokens": ({"model": "base", "prompt": "x", "max_tokens": 0}, 400, None, "max_tokens: Input should be"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_requests(case, http):
    body, status, code, message = BAD[case]
    response = http.post("/v1/completions", json=body)
    assert response.status_code == status
    error = response.json()["error"]
    assert error["code"] == code
    assert message in error["message"]


def test_bad_bodies_and_paths(http, client):
    response = http.post("/v1/completions", content=b'{"model": ', headers={"content-type": "application/json"})
    assert response.status_code == 400
    assert "not valid JSON" in response.json()["error"]["message"]
    assert http.get("/v1/nothing").status_code == 404
    assert http.get("/v1/completions").status_code == 405
    assert http.post("/v1/chat/completions", json={"model": "base", "messages": []}).status_code == 400
    assert http.get("/health").json() == {"status": "ok"}
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="nobody", prompt="x")


def wait_until_idle(engine: Engine) -> None:
    for _ in range(500):
        if not engine.has_work:
            return
        time.sleep(0.01)
    pytest.fail("the engine still has work")


@pytest.mark.parametrize("stream", [True, False])
def test_client_that_goes_away_frees_its_pages(stream, url, engine):
    body = json.dumps({"model": "plain", "prompt": "x", "max_tokens": 200, "stream": stream, "ignore_eos": True})
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        head = ["POST /v1/completions HTTP/1.1", "Host: x", "Content-Type: application/json"]
        head.append(f"Content-Length: {len(body)}")
        connection.sendall("\r\n".join([*head, "", body]).encode())
        while not engine.scheduler.running:
            time.sleep(0.001)
        if stream:
            connection.recv(10)
        generated = len(engine.scheduler.running[0].output)
    wait_until_idle(engine)
    assert generated < 150, "the answer was complete before the client left"
    assert engine.scheduler.pool.num_free == engine.scheduler.pool.num_pages


def test_fault_in_a_step_ends_its_requests_and_not_the_server(client, engine, monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("planted")

    with monkeypatch.context() as patch:
        patch.setattr(engine.runner, "run", broken)
        with pytest.raises(openai.InternalServerError, match="the engine failed"):
            client.completions.create(model="base", prompt="x", max_tokens=3)
    assert client.completions.create(model="base", prompt="x", max_tokens=3).choices
    engine.check()


def test_api_key(base):
    with Engine(str(base)) as engine, background_server(engine, api_key="secret") as url:
        for headers, status in (
            ({}, 401),
            ({"authorization": "Bearer wrong"}, 401),
            ({"authorization": "Bearer secret"}, 200),
        ):
            assert httpx.get(f"{url}/v1/models", headers=headers, trust_env=False).status_code == status
        assert httpx.get(f"{url}/health", trust_env=False).status_code == 200


def test_taken_port_is_one_clear_line(base):
    with socket.create_server(("127.0.0.1", 0)) as taken, Engine(str(base)) as engine:
        port = taken.getsockname()[1]
        with (
            pytest.raises(OutputError, match=rf"cannot listen on 127\.0\.0\.1:{port}"),
            background_server(engine, port=port),
        ):
            pass


def test_command_serves_until_it_is_told_to_stop(base, loras, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    spec = tmp_path / "serve.yaml"
    spec.write_text(f"model: {base}\nadapters: {{plain: {loras['plain']}}}\nlimits: {{max_requests: 2}}\n")
    command = [
        sys.executable,
        "-m",
        "toolkit",
        "serve",
        str(spec),
        "--adapter",
        f"few={loras['few']}",
        "--port",
        str(port),
    ]
    environment = dict(os.environ, COLUMNS="150")
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        for _ in range(600):
            try:
                names = [
                    m["id"] for m in httpx.get(f"http://127.0.0.1:{port}/v1/models", trust_env=False).json()["data"]
                ]
                break
            except httpx.TransportError:
                assert process.poll() is None
                time.sleep(0.1)
        assert names == ["base", "plain", "few"]
        process.send_signal(signal.SIGTERM)
        _, shown = process.communicate(timeout=60)
        assert f"listening on http://127.0.0.1:{port}/v1" in shown
        assert "LoRA, rank 2" in shown
        assert process.returncode in (0, -signal.SIGTERM)
    finally:
        process.kill()
