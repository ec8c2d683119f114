"""Adapters that come and go while requests run, and paths that lead nowhere they should not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import httpx
import openai
import pytest
import torch

from tests import tiny
from tests.serving.test_server import word_router
from toolkit.serving.engine import Engine
from toolkit.serving.serve import background_server
from toolkit.serving.spec import Limits


@pytest.fixture
def root(tmp_path, loras) -> Path:
    """A folder with an adapter `one` in it, and what a client must not reach beside it."""
    root = tmp_path / "root"
    shutil.copytree(loras["plain"], root / "one")
    shutil.copytree(loras["wide"], tmp_path / "root2" / "other")
    shutil.copytree(loras["wide"], tmp_path / "outside")
    return root


@pytest.fixture
def engine(base, loras):
    with Engine(str(base), {"dora": loras["dora"]}, limits=Limits(page_size=4)) as engine:
        yield engine


@pytest.fixture
def http(engine, root):
    with background_server(engine, adapter_roots=[root]) as url, client_of(url) as http:
        yield http


def client_of(url: str) -> httpx.Client:
    return httpx.Client(base_url=url, trust_env=False, timeout=60)


def answer(http: httpx.Client, model: str, count: int = 12) -> str:
    body = {"model": model, "prompt": "Once upon", "max_tokens": count, "temperature": 0, "ignore_eos": True}
    response = http.post("/v1/completions", json=body)
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]["text"]


def expected(engine: Engine, base: Path, lora: Path, count: int = 12) -> str:
    ids = tiny.greedy(tiny.load_merged(base, lora), engine.tokenizer.encode("Once upon"), count)
    return engine.tokenizer.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("absolute", [True, False])
def test_an_adapter_comes_and_goes(absolute, http, engine, root, base, loras):
    path = str(root / "one") if absolute else "one"
    response = http.post("/v1/adapters", json={"name": "new", "path": path})
    assert response.status_code == 201
    shown = response.json()
    assert (shown["id"], shown["status"], shown["path"]) == ("new", "loaded", str(root / "one"))
    assert shown["version"] == engine.adapters.infos["new"].key
    assert http.get("/v1/adapters/new").json() | {"status": "loaded"} == shown
    assert [a["id"] for a in http.get("/v1/adapters").json()["data"]] == ["dora", "new"]
    assert [m["id"] for m in http.get("/v1/models").json()["data"]] == ["base", "dora", "new"]
    assert answer(http, "new") == expected(engine, base, loras["plain"])
    again = http.post("/v1/adapters", json={"name": "new", "path": path})
    assert (again.status_code, again.json()["status"]) == (200, "unchanged")
    assert http.delete("/v1/adapters/new").json() == {"id": "new", "object": "adapter", "deleted": True}
    assert http.delete("/v1/adapters/new").status_code == 404
    assert http.post("/v1/completions", json={"model": "new", "prompt": "x"}).status_code == 404


def test_a_changed_folder_is_a_new_version_and_requests_under_way_keep_their_own(http, engine, root, base, loras):
    first = http.post("/v1/adapters", json={"name": "one", "path": "one"}).json()
    body = {"model": "one", "prompt": "Once upon", "max_tokens": 200, "temperature": 0, "ignore_eos": True}
    with http.stream("POST", "/v1/completions", json=body | {"stream": True}) as response:
        lines = response.iter_lines()
        events = [next(lines)]
        shutil.copytree(loras["wide"], root / "one", dirs_exist_ok=True)
        second = http.post("/v1/adapters", json={"name": "one"}).json()
        assert engine.scheduler.running, "the first answer is under way all the time"
        events += list(lines)
    assert second["status"] == "reloaded"
    assert second["version"] != first["version"]
    chunks = [json.loads(line.removeprefix("data: ")) for line in events if line.startswith("data: {")]
    assert "".join(c["choices"][0]["text"] for c in chunks) == expected(engine, base, loras["plain"], 200)
    assert answer(http, "one") == expected(engine, base, loras["wide"])
    assert set(engine.adapters._entries) == {engine.adapters.infos[n].key for n in ("one", "dora")}, (
        "the old one is gone"
    )


def test_an_adapter_that_is_unloaded_serves_what_it_began(http, engine, base, loras):
    http.post("/v1/adapters", json={"name": "one", "path": "one"})
    body = {"model": "one", "prompt": "Once upon", "max_tokens": 150, "temperature": 0, "ignore_eos": True}
    with http.stream("POST", "/v1/completions", json=body | {"stream": True}) as response:
        lines = response.iter_lines()
        events = [next(lines)]
        assert http.delete("/v1/adapters/one").status_code == 200
        assert engine.scheduler.running
        events += list(lines)
    chunks = [json.loads(line.removeprefix("data: ")) for line in events if line.startswith("data: {")]
    assert "".join(c["choices"][0]["text"] for c in chunks) == expected(engine, base, loras["plain"], 150)


def test_the_servers_own_adapter_is_read_anew_from_outside_of_the_roots(http, loras):
    assert http.post("/v1/adapters", json={"name": "dora"}).json()["status"] == "unchanged"
    response = http.post("/v1/adapters", json={"name": "dora", "path": str(loras["dora"])})
    assert response.status_code == 403, "a client's own path is checked all the same"


OUTSIDE = [
    "..",
    "../outside",
    "../root2/other",
    "one/../../outside",
    "/etc",
    "/",
    "~",
    "/nowhere/at/all",
    "a\0b",
    "\ud800",
]


@pytest.mark.parametrize("path", OUTSIDE)
@pytest.mark.parametrize("alias", [False, True])
def test_paths_outside_of_the_roots(alias, path, http, root):
    body = {"lora_name": "x", "lora_path": path} if alias else {"name": "x", "path": path}
    response = http.post(
        "/v1/load_lora_adapter" if alias else "/v1/adapters",
        content=json.dumps(body),
        headers={"content-type": "application/json"},
    )
    if path == "\ud800":
        assert response.status_code in (400, 403)  # not Unicode, so no body
        return
    if path == "~":
        assert response.status_code == 404, "a folder of that name in the root, not anybody's home"
        return
    assert (response.status_code, response.json()["error"]["code"]) == (403, "path_not_allowed")
    assert "is outside of the folders that adapters may come from" in response.json()["error"]["message"]


def test_what_is_outside_is_refused_the_same_whether_it_exists_or_not(http, root):
    answers = []
    for name in ("outside", "absent"):
        path = str(root.parent / name)
        answers.append(http.post("/v1/adapters", json={"name": "x", "path": path}).text.replace(path, "PATH"))
    assert answers[0] == answers[1]


def test_links_that_lead_outside(http, root):
    (root / "link").symlink_to(root.parent / "outside")
    shutil.copytree(root / "one", root / "file")
    (root / "file" / "adapter_model.safetensors").unlink()
    (root / "file" / "adapter_model.safetensors").symlink_to(root.parent / "outside" / "adapter_model.safetensors")
    (root / "inner").symlink_to(root / "one")
    for path in ("link", "file"):
        response = http.post("/v1/adapters", json={"name": "x", "path": path})
        assert (response.status_code, response.json()["error"]["code"]) == (403, "path_not_allowed")
    assert http.post("/v1/adapters", json={"name": "x", "path": "inner"}).status_code == 201


def test_folders_that_hold_no_adapter_that_can_be_served(http, root, base, loras):
    (root / "empty").mkdir()
    pickled = root / "pickled"
    pickled.mkdir()
    shutil.copy(loras["plain"] / "adapter_config.json", pickled)
    torch.save({}, pickled / "adapter_model.bin")
    tiny.save_lora(base, root / "prefix", seed=1)
    config = json.loads((root / "prefix" / "adapter_config.json").read_text())
    (root / "prefix" / "adapter_config.json").write_text(json.dumps(config | {"peft_type": "IA9"}))
    for path, message in (
        ("empty", "neither adapter_config.json nor weights"),
        ("pickled", "only pickled weights"),
        ("prefix", "IA9"),
    ):
        response = http.post("/v1/adapters", json={"name": "x", "path": path})
        assert response.status_code == 400, response.text
        assert message in response.json()["error"]["message"]
    assert http.post("/v1/adapters", json={"name": "x", "path": "absent"}).status_code == 404
    assert [a["id"] for a in http.get("/v1/adapters").json()["data"]] == ["dora"]


@pytest.mark.parametrize("name", ["a+b", "a:b", "a/b", "../../etc", "a\\b", "", "base", "auto", "a\nb"])
def test_names_that_are_refused(name, http):
    response = http.post("/v1/adapters", json={"name": name, "path": "one"})
    assert response.status_code == 400
    assert "adapter name" in response.json()["error"]["message"]


def test_a_model_name_is_never_a_path(http, root):
    for name in (str(root / "one"), f"../{root.name}/one", "one", "..", "/"):
        response = http.post("/v1/completions", json={"model": name, "prompt": "x"})
        assert (response.status_code, response.json()["error"]["code"]) == (404, "model_not_found")


def test_vllms_two_paths(http, engine, root, base, loras):
    load = {"lora_name": "new", "lora_path": str(root / "one")}
    response = http.post("/v1/load_lora_adapter", json=load)
    assert (response.status_code, response.text) == (200, "Success: LoRA adapter 'new' added successfully.")
    assert answer(http, "new") == expected(engine, base, loras["plain"])
    response = http.post("/v1/load_lora_adapter", json=load)
    assert (response.status_code, response.json()["error"]["code"]) == (400, "adapter_exists")
    shutil.copytree(loras["wide"], root / "one", dirs_exist_ok=True)
    assert http.post("/v1/load_lora_adapter", json=load | {"load_inplace": True}).status_code == 200
    assert answer(http, "new") == expected(engine, base, loras["wide"])
    assert len(engine.adapters._entries) == 2, "the old version is gone at once, for nobody used it"
    response = http.post("/v1/unload_lora_adapter", json={"lora_name": "new"})
    assert (response.status_code, response.text) == (200, "Success: LoRA adapter 'new' removed successfully.")
    assert http.post("/v1/unload_lora_adapter", json={"lora_name": "new"}).status_code == 404


def test_without_roots_no_path_is_taken(base, loras):
    with Engine(str(base), {"x": loras["few"]}) as engine, background_server(engine) as url, client_of(url) as http:
        response = http.post("/v1/adapters", json={"name": "y", "path": str(loras["few"])})
        assert response.status_code == 403
        assert "start it with --adapter-root FOLDER" in response.json()["error"]["message"]
        assert http.post("/v1/adapters", json={"name": "x"}).json()["status"] == "unchanged"


def test_what_the_router_needs_stays(base, loras):
    adapters = {name: loras[name] for name in ("wide", "plain", "few")}
    with (
        Engine(str(base), adapters, word_router(base)) as engine,
        background_server(engine) as url,
        client_of(url) as http,
    ):
        response = http.delete("/v1/adapters/wide")
        assert response.status_code == 409
        assert "the router chooses among wide, plain, so wide stays" in response.json()["error"]["message"]
        assert http.delete("/v1/adapters/few").status_code == 200


def test_openais_client_sees_what_was_loaded(engine, root):
    with background_server(engine, adapter_roots=[root]) as url:
        httpx.post(f"{url}/v1/adapters", json={"name": "new", "path": "one"}, trust_env=False).raise_for_status()
        with openai.OpenAI(base_url=f"{url}/v1", api_key="any") as client:
            assert "new" in [model.id for model in client.models.list()]
            assert client.completions.create(model="new", prompt="x", max_tokens=2).model == "new"
