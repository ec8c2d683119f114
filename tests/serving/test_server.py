"""The server as its users meet it: through OpenAI's own client, and through bad requests."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import numpy as np
import openai
import pytest

from tests import tiny
from tests.serving.test_engine import same_but_for_ties
from toolkit.embedded.tokenizer import build_tokenizer
from toolkit.errors import OutputError, SpecError, UnsupportedError
from toolkit.routing.embedding import EmbeddingSpec
from toolkit.routing.features import Features
from toolkit.routing.router import Router
from toolkit.routing.spec import FeaturesSpec
from toolkit.serving.engine import Engine
from toolkit.serving.serve import _listen, _server, _warnings, background_server, same_base, serve
from toolkit.serving.spec import Limits, ServeSpec
from toolkit.specs import load

MESSAGES = [{"role": "user", "content": "Say something."}]


def word_router(base: Path) -> Router:
    """A router that any prompt with the word wide goes to `wide`, else to `plain`; its vectors are made by hand."""

    def embed(texts):
        return np.array([[1.0, 0.0] if "wide" in text else [0.0, 1.0] for text in texts], np.float32)

    state = {
        "center": np.zeros(2, np.float32),
        "whitening": np.eye(2, dtype=np.float32),
        "centroids": np.eye(2, dtype=np.float32),
    }
    features = Features(FeaturesSpec(embedding=EmbeddingSpec(model="by hand")), embedder=embed)
    return Router("centroid", ["wide", "plain"], state, features)


@pytest.fixture(scope="module")
def engine(base, loras):
    engine = Engine(
        str(base),
        loras,
        word_router(base),
        limits=Limits(max_requests=4, page_size=4, max_batch_tokens=64, cache_tokens=300),
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
        {"model": "base", "prompt": "x", "suffix": "y"},
        400,
        None,
        'suffix: "y" is not supported by this server, only "" or null',
    ),
    "logprobs": ({"model": "base", "prompt": "x", "logprobs": 21}, 400, None, "logprobs: Input should be less than"),
    "true logprobs": ({"model": "base", "prompt": "x", "logprobs": True}, 400, None, "logprobs: Input should be a num"),
    "unknown field": ({"model": "base", "prompt": "x", "logprob": 2}, 400, None, "logprob: not supported by this"),
    "unknown null": ({"model": "base", "prompt": "x", "logprob": None}, 400, None, "logprob: not supported by this"),
    "best of two": ({"model": "base", "prompt": "x", "best_of": 2}, 400, None, "best_of: 2 is not supported"),
    "penalty": (
        {"model": "base", "prompt": "x", "presence_penalty": 3},
        400,
        None,
        "presence_penalty: Input should be",
    ),
    "bias": ({"model": "base", "prompt": "x", "logit_bias": {"x": 1}}, 400, None, "logit_bias.x: Input should be a v"),
    "large bias": ({"model": "base", "prompt": "x", "logit_bias": {"5": 101}}, 400, None, "logit_bias.5: Input should"),
    "bias of nothing": (
        {"model": "base", "prompt": "x", "logit_bias": {"300": 1}},
        400,
        None,
        "names token id 300, but",
    ),
    "no number": ({"model": "base", "prompt": "x", "min_p": float("nan")}, 400, None, "min_p: Input should be"),
    "token id": ({"model": "base", "prompt": [300]}, 400, None, "token id 300, but the model's ids are 0 to 261"),
    "negative id": ({"model": "base", "prompt": [-1]}, 400, None, "token id -1"),
    "huge id": ({"model": "base", "prompt": [10**30]}, 400, None, "token id 1000000000000000000000000000000"),
    "surrogate": ({"model": "base", "prompt": "\ud800"}, 400, None, "the prompt is not valid Unicode"),
    "surrogate key": (
        {"model": "base", "prompt": "x", "\ud800": 1},
        400,
        None,
        "a key of the body is not valid Unicode",
    ),
    "surrogate model": ({"model": "\ud800", "prompt": "x"}, 404, "model_not_found", "no model '\\ud800'"),
    "huge seed": ({"model": "base", "prompt": "x", "seed": 10**30}, 400, None, "seed: Input should be less than"),
    "prompts": ({"model": "base", "prompt": ["a"] * 65, "n": 2}, 400, None, "65 prompts with n = 2 are more than 128"),
    "number": ({"model": "base", "prompt": 5}, 400, None, "prompt: Input should be a text, a list of token ids, or a"),
    "numbers in lists": ({"model": "base", "prompt": ["a", 5]}, 400, None, "prompt: Input should be a text, a list of"),
    "no stop": ({"model": "base", "prompt": "x", "stop": 5}, 400, None, "stop: Input should be a valid string or"),
    "too large for the cache": (
        {"model": "patterns", "prompt": "x", "max_tokens": 250},
        400,
        None,
        "the cache holds 300 beside",
    ),
    "no answers": (
        {"model": "base", "prompt": "x", "n": 0},
        400,
        None,
        "n: Input should be greater than or equal to 1",
    ),
    "bad temperature": ({"model": "base", "prompt": "x", "temperature": -1}, 400, None, "temperature: Input should be"),
    "no tokens": ({"model": "base", "prompt": "x", "max_tokens": 0}, 400, None, "max_tokens is 0, which only echo has"),
    "fewer": ({"model": "base", "prompt": "x", "max_tokens": -1}, 400, None, "max_tokens: Input should be greater"),
}


def post(http: httpx.Client, body: dict) -> httpx.Response:
    """Send a completion's body as plain ASCII, in which JSON can hold what is not Unicode; httpx's own cannot."""
    return http.post("/v1/completions", content=json.dumps(body), headers={"content-type": "application/json"})


@pytest.mark.parametrize("case", BAD)
def test_bad_requests(case, http):
    body, status, code, message = BAD[case]
    response = post(http, body)
    assert response.status_code == status
    error = response.json()["error"]
    assert error["code"] == code
    assert message in error["message"]
    assert (error["param"] or "prompt").replace(".", "").isidentifier(), (
        "a field of the body, without pydantic's names of branches"
    )


def test_bad_bodies_and_paths(http, client):
    for content, kind, message in (
        (b'{"model": ', "application/json", "the body is not valid JSON (Expecting value)"),
        (b"[1]", "application/json", "the body must be a JSON object"),
        (b'{"model": "base", "prompt": "x"}', "text/plain", "send the body as JSON, with the header Content-Type"),
        (b'{"model": "base", "prompt": "x"}', None, "send the body as JSON, with the header Content-Type"),
    ):
        response = http.post("/v1/completions", content=content, headers={"content-type": kind} if kind else {})
        error = response.json()["error"]
        assert (response.status_code, error["param"]) == (400, None)
        assert message in error["message"]
    assert http.get("/v1/nothing").status_code == 404
    assert http.get("/v1/completions").status_code == 405
    assert http.post("/v1/chat/completions", json={"model": "base", "messages": []}).status_code == 400
    assert http.get("/health").json() == {"status": "ok"}
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="nobody", prompt="x")


NO_OPS = {
    "temperature": None,
    "top_p": None,
    "n": None,
    "stream": None,
    "top_k": None,
    "ignore_eos": None,
    "stop_token_ids": None,
    "max_tokens": None,
    "stop": None,
    "seed": None,
    "user": None,
    "presence_penalty": 0,
    "frequency_penalty": 0.0,
    "logit_bias": {},
    "logprobs": False,
    "store": False,
    "metadata": {"a": "b"},
    "service_tier": "auto",
    "stream_options": None,
}
CHAT_NO_OPS = {
    "max_completion_tokens": None,
    "top_logprobs": 0,
    "response_format": {"type": "text"},
    "tools": [],
    "parallel_tool_calls": True,
}


def test_fields_that_ask_for_nothing_are_taken(http):
    seeded = {"model": "base", "seed": 3}
    for path, asked, extra in (
        ("/v1/completions", {"prompt": "x"}, {"best_of": 1, "echo": False, "suffix": "", "logprobs": None}),
        ("/v1/chat/completions", {"messages": MESSAGES}, CHAT_NO_OPS),
    ):
        plain, full = (http.post(path, json=seeded | body) for body in (asked, NO_OPS | extra | asked | seeded))
        assert (plain.status_code, full.status_code) == (200, 200), full.text
        assert full.json()["choices"][0].keys() == plain.json()["choices"][0].keys()
        both = (http.post(path, json=body | {"max_tokens": 6} | seeded).json() for body in (asked, NO_OPS | asked))
        one, other = (answer["choices"] for answer in both)
        assert one == other


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tool_choice", "required"),
        ("store", True),
        ("service_tier", "flex"),
    ],
)
def test_fields_that_ask_for_what_is_not_served(field, value, http):
    response = http.post("/v1/chat/completions", json={"model": "base", "messages": MESSAGES, field: value})
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, field)
    assert "is not supported by this server, only" in error["message"]


@pytest.mark.parametrize("options", [{"include_usage": None}, {"include_obfuscation": False}])
def test_stream_options_that_ask_for_nothing(options, client):
    stream = client.completions.create(
        model="base", prompt="x", max_tokens=2, stream=True, stream_options=options, extra_body={"ignore_eos": True}
    )
    assert [c.usage for c in stream] == [None, None]


def test_messages_in_parts_and_of_developers(client, http):
    def ask(messages):
        return client.chat.completions.create(model="wide", messages=messages, max_tokens=8, temperature=0)

    parts = [{"type": "text", "text": "be "}, {"type": "text", "text": "brief"}]
    whole = ask([{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi", "name": None}])
    split = ask([{"role": "developer", "content": parts}, {"role": "user", "content": "hi", "name": "ann"}])
    assert split.choices[0].message.content == whole.choices[0].message.content
    assert split.usage == whole.usage
    for content, message in (
        ([{"type": "image_url", "image_url": {"url": "x"}}], 'a part of type "image_url" is not supported'),
        ([{"type": "text"}], "a part of type text must have a text"),
        (5, "Input should be a valid string"),
    ):
        messages = [{"role": "user", "content": content}]
        error = http.post("/v1/chat/completions", json={"model": "base", "messages": messages}).json()["error"]
        assert message in error["message"]
        assert error["param"] == "messages.0.content"


def test_list_of_one_prompt(client):
    def ask(prompt):
        answer = client.completions.create(model="few", prompt=prompt, max_tokens=8, temperature=0)
        return answer.choices[0].text, answer.usage

    assert ask(["abc"]) == ask("abc") == ask([97, 98, 99]) == ask([[97, 98, 99]])


def test_one_model(client):
    assert client.models.retrieve("dora").id == "dora"
    with pytest.raises(openai.NotFoundError, match="no model 'nobody'"):
        client.models.retrieve("nobody")


def test_bad_requests_leave_running_ones_alone(http, engine, base, loras):
    """Whatever a request asks, what runs beside it is answered as if it were alone."""
    good = {"model": "plain", "prompt": "Once upon", "max_tokens": 200, "temperature": 0, "ignore_eos": True}
    answers: list[httpx.Response] = []
    thread = threading.Thread(target=lambda: answers.append(http.post("/v1/completions", json=good)))
    thread.start()
    while not engine.scheduler.running:
        time.sleep(0.001)
    attacks = [{"prompt": [999_999]}, {"prompt": "\ud800"}, {"seed": 10**30}, {"prompt": [10**30]}]
    for attack in attacks:
        assert post(http, {"model": "few", "prompt": "x"} | attack).status_code == 400
    assert post(http, {"model": "few", "prompt": "x", "temperature": 1e-40, "max_tokens": 3}).status_code == 200
    assert engine.scheduler.running, "the long answer is under way all the time"
    thread.join()
    assert answers[0].json()["choices"][0]["text"] == expected_text(engine, base, loras, "plain", "Once upon", 200)


def test_fault_of_the_router_ends_what_waits_for_it_only(client, engine, monkeypatch):
    def broken(prompts):
        raise RuntimeError("planted")

    with monkeypatch.context() as patch:
        patch.setattr(engine.router, "choose", broken)
        stream = client.completions.create(
            model="base", prompt="x", max_tokens=40, stream=True, extra_body={"ignore_eos": True}
        )
        with pytest.raises(openai.InternalServerError, match="the router failed"):
            client.completions.create(model="auto", prompt="x", max_tokens=3)
        assert [c.choices[0].finish_reason for c in stream][-1] == "length"
    engine.check()


def test_unexpected_fault_is_an_error_as_clients_expect_it(http, engine, monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("planted")

    with monkeypatch.context() as patch:
        patch.setattr(engine, "submit", broken)
        response = http.post("/v1/completions", json={"model": "base", "prompt": "x"})
    assert response.status_code == 500
    assert response.json()["error"] == {
        "message": "the server failed; see its log",
        "type": "server_error",
        "param": None,
        "code": "internal_error",
    }


def test_adapter_names_in_any_script(base, loras):
    with Engine(str(base), {"日本 é": loras["few"]}) as engine, background_server(engine) as url:
        body = {"model": "日本 é", "prompt": "x", "max_tokens": 2}
        response = httpx.post(f"{url}/v1/completions", json=body, trust_env=False)
        assert response.json()["model"] == "日本 é"
        assert response.headers["x-toolkit-model"] == "%E6%97%A5%E6%9C%AC%20%C3%A9"
        assert httpx.get(f"{url}/v1/models/日本 é", trust_env=False).json()["id"] == "日本 é"


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


def test_second_server_on_a_port_fails_at_once(base):
    listener = _listen("127.0.0.1", 0)
    with contextlib.closing(listener):
        port = listener.getsockname()[1]
        with pytest.raises(OutputError, match=rf"cannot listen on 127\.0\.0\.1:{port}"):
            _listen("127.0.0.1", port)


def test_ipv6_addresses_are_in_brackets(base):
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("no IPv6 here")
    with Engine(str(base)) as engine, background_server(engine, host="::1") as url:
        assert url.startswith("http://[::1]:")
        assert httpx.get(f"{url}/health", trust_env=False).json() == {"status": "ok"}


def test_errors_of_a_spec_name_its_keys_and_lines(base, tmp_path):
    router = word_router(base)
    router.save(tmp_path / "router")
    spec = tmp_path / "serve.yaml"
    spec.write_text(f"model: {base}\nrouter: {tmp_path / 'router'}\nport: 0\n")
    with pytest.raises(
        SpecError, match=r"serve\.yaml: line 2: router: the router chooses among wide, plain, which are"
    ):
        serve(spec, quiet=True)
    spec.write_text(f"model: {base}\nport: 0\nlimits:\n  max_model_len: 999\n")
    with pytest.raises(SpecError, match=r"serve\.yaml: line 4: limits\.max_model_len: the model takes at most 256"):
        serve(spec, quiet=True)
    with pytest.raises(UnsupportedError, match="unknown dtype 'bogus'"):
        serve({"model": str(base), "port": 0, "dtype": "bogus"}, quiet=True)


@pytest.mark.parametrize(
    ("host", "key", "warned"), [("0.0.0.0", [], True), ("0.0.0.0", ["k"], False), ("127.0.0.1", [], False)]
)
def test_another_host_without_a_key_warns(host, key, warned, base):
    with Engine(str(base)) as engine:
        found = list(_warnings(engine, ServeSpec(model="x", host=host, api_key=key), host, f"{host}:8000"))
    assert found == ([f"anyone who reaches {host}:8000 is served; set an API key"] if warned else [])


def test_keys_and_roots_of_a_spec():
    spec = ServeSpec.model_validate({"model": "x", "api_key": "one", "limits": {"max_body": "2MB"}})
    assert (spec.api_key, spec.limits.max_body, spec.adapter_roots) == (["one"], 2_000_000, [])
    with pytest.raises(SpecError, match=r"api_key.*at least 1 character"):
        load({"model": "x", "api_key": ["one", ""]}, ServeSpec)


def test_sigterm_lets_answers_finish_and_takes_no_more(base, loras, tmp_path):
    shutil.copytree(loras["plain"], tmp_path / "roots" / "late")
    command = [sys.executable, "-m", "toolkit", "serve", str(base), "--port", "0", "--api-key", "one"]
    command += ["--api-key", "two", "--adapter-root", str(tmp_path / "roots")]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr
        url = next(found[1] for line in process.stderr if (found := re.search(r"listening on (http://\S+)/v1", line)))
        with httpx.Client(base_url=url, trust_env=False, timeout=60, headers={"authorization": "Bearer two"}) as http:
            assert http.post("/v1/adapters", json={"name": "late", "path": "late"}).status_code == 201
            body = {"model": "late", "prompt": "x", "max_tokens": 250, "temperature": 0, "ignore_eos": True}
            with http.stream("POST", "/v1/completions", json=body | {"stream": True}) as response:
                lines = response.iter_lines()
                events = [next(lines)]
                process.send_signal(signal.SIGTERM)
                host, port = url.removeprefix("http://").split(":")
                refused = False
                for line in lines:
                    events.append(line)
                    with socket.socket() as late:
                        refused = refused or late.connect_ex((host, int(port))) != 0
        assert refused
        assert events[-2 if not events[-1] else -1] == "data: [DONE]"
        chunks = [json.loads(line.removeprefix("data: ")) for line in events if line.startswith("data: {")]
        ids = tiny.greedy(tiny.load_merged(base, loras["plain"]), [120], 250)
        text = build_tokenizer().decode(ids, skip_special_tokens=True)
        assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == text
        logged = [json.loads(line) for line in process.stderr if line.startswith("{")]
        assert [line["endpoint"] for line in logged] == ["/v1/adapters", "/v1/completions"]
        assert logged[1]["tokens"] == 250
        assert process.wait(60) in (0, -signal.SIGTERM)
    finally:
        process.kill()
        process.stderr.close()


def test_draining_has_an_end(base, monkeypatch):
    with Engine(str(base)) as engine:
        run = engine.runner.run
        monkeypatch.setattr(engine.runner, "run", lambda step: (time.sleep(0.05), run(step))[1])
        listener = _listen("127.0.0.1", 0)
        server = _server(engine, {}, log_level="critical", timeout_graceful_shutdown=1)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        body = {"model": "base", "prompt": "x", "max_tokens": 250, "ignore_eos": True, "stream": True}
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/v1/completions"
        with httpx.stream("POST", url, json=body, trust_env=False, timeout=60) as response:
            lines = response.iter_lines()
            next(lines)
            server.should_exit, begun = True, time.monotonic()
            with contextlib.suppress(httpx.TransportError):
                assert "data: [DONE]" not in list(lines)
        thread.join(30)
        assert time.monotonic() - begun < 8, "the answer alone would take 12 seconds"
        assert engine.scheduler.pool.num_free == engine.scheduler.pool.num_pages


def test_same_base(tmp_path):
    here, there = tmp_path / "a" / "base", tmp_path / "b" / "base"
    here.mkdir(parents=True)
    there.mkdir(parents=True)
    for one, other, same in (
        ("toolkit:base", "toolkit:base", True),
        ("meta-llama/Llama-2-7b", "meta-llama/Llama-2-7b", True),
        ("meta-llama/Llama-2-7b", "other/Llama-2-7b", False),
        (str(here), f"{here}/../base", True),
        (str(here), str(there), False),
        ("owner/base", str(here), True),
        ("owner/other", str(here), False),
        ("/gone/base", str(here), True),
        ("/gone/other", str(here), False),
    ):
        assert same_base(one, other) == same_base(other, one) == same, (one, other)


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
    foreign = Path(shutil.copytree(loras["wide"], tmp_path / "foreign"))
    config = json.loads((foreign / "adapter_config.json").read_text())
    (foreign / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "someone/else"}))
    command += ["--adapter", f"foreign={foreign}"]
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
        assert names == ["base", "plain", "few", "foreign"]
        process.send_signal(signal.SIGTERM)
        _, shown = process.communicate(timeout=60)
        assert f"listening on http://127.0.0.1:{port}/v1" in shown
        assert "LoRA, rank 2" in shown
        assert shown.count("warning: ") == 1
        assert f"warning: adapter foreign was trained on someone/else, but {base} is served" in shown
        assert process.returncode in (0, -signal.SIGTERM)
    finally:
        process.kill()
