"""The router of a running server: what it says of its choices, what it counts, and how it is replaced."""

from __future__ import annotations

import json
import logging
import re
import shutil
import threading
import time
from collections import Counter
from pathlib import Path

import httpx
import numpy as np
import pytest

from toolkit.data.rows import write_rows
from toolkit.errors import CheckpointError, SpecError
from toolkit.routing.drift import FEWEST
from toolkit.routing.embedding import EmbeddingSpec
from toolkit.routing.examples import labelled
from toolkit.routing.features import Features
from toolkit.routing.fit import fit_router
from toolkit.routing.router import Router, load_router
from toolkit.routing.routers import naive_bayes
from toolkit.routing.spec import FeaturesSpec
from toolkit.serving.engine import Engine
from toolkit.serving.http.metrics import MOST_MODELS, Metrics
from toolkit.serving.loop import EngineLoop
from toolkit.serving.router_watch import RouterWatch
from toolkit.serving.serve import background_server
from toolkit.serving.spec import Limits

LIMITS = Limits(max_requests=8, page_size=4, max_batch_tokens=64, cache_tokens=800)
SUMS = [f"What is {a} plus {a * 7 % 100}?" for a in range(300)]
WORDS = [f"Spell the word {'abcdefghij'[a % 10]}{'klmnopqrst'[a // 10 % 10]}ing backwards {a}" for a in range(300)]


@pytest.fixture(scope="module")
def routers(tmp_path_factory) -> Path:
    """Folders of routers that send the same prompts to other experts, one of them with a scope."""
    root = tmp_path_factory.mktemp("routers")
    for name, prompts in (("sums", SUMS), ("words", WORDS)):
        write_rows(root / f"{name}.jsonl", [{"prompt": prompt} for prompt in prompts])
    kinds = {
        "a": {"experts": {"plain": "sums", "wide": "words"}, "scope": 0.01},
        "b": {"experts": {"plain": "words", "few": "sums"}},
        "unserved": {"experts": {"plain": "words", "nobody": "sums"}},
        "homeless": {"experts": {"plain": "words"}, "policy": {"minimum": 0.0, "fallback": "nobody"}},
    }
    for name, kind in kinds.items():
        experts = {expert: str(root / f"{file}.jsonl") for expert, file in kind["experts"].items()}
        spec = {"router": "naive_bayes", "words": {"buckets": 256, "dimensions": 8}} | kind | {"experts": experts}
        fit_router(spec, root / name, quiet=True)
    return root


@pytest.fixture
def folder(routers, tmp_path) -> Path:
    shutil.copytree(routers / "a", tmp_path / "router")
    return tmp_path / "router"


@pytest.fixture
def engine(base, loras, folder):
    with Engine(str(base), {name: loras[name] for name in ("plain", "wide", "few")}, folder, limits=LIMITS) as engine:
        yield engine


def client(url) -> httpx.Client:
    return httpx.Client(base_url=url, trust_env=False, timeout=60)


def ask(http, prompt, **more):
    body = {"model": "auto", "prompt": prompt, "max_tokens": 2, "temperature": 0}
    return http.post("/v1/completions", json=body | more)


def metrics(http) -> dict[str, float]:
    lines = http.get("/metrics").text.splitlines()
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if line[0] != "#")}


def test_answers_carry_expert_scores_reason_and_version(engine, routers):
    router = load_router(routers / "a")
    with background_server(engine, router_seconds=0) as url, client(url) as http:
        for prompt, expert in ((SUMS[0], "plain"), (WORDS[0], "wide"), ("zzz qqq xxx", "base")):
            expected = router.choose([prompt])[0]
            answer = ask(http, prompt).json()
            routing = answer["routing"]
            assert answer["model"] == routing["expert"] == expected.expert == expert
            assert routing["scores"] == pytest.approx(expected.scores, rel=1e-4)
            assert routing["version"] == router.version
            assert routing["reason"] == expected.reason == ("out of scope" if expert == "base" else "best")
            assert routing["margin"] == pytest.approx(expected.margin, rel=1e-3)
        several = ask(http, [SUMS[1], WORDS[1]]).json()["choices"]
        assert [choice["routing"]["expert"] for choice in several] == ["plain", "wide"]
        events = ask(http, SUMS[2], stream=True, max_tokens=4, ignore_eos=True).text.split("\n\n")
        parts = [json.loads(event.removeprefix("data: ")) for event in events if event.startswith("data: {")]
        assert ["routing" in part for part in parts] == [True] + [False] * (len(parts) - 1)
        assert len(parts) > 1
        assert parts[0]["routing"]["version"] == router.version
        assert {part["model"] for part in parts} == {"plain"}
    answer = engine.generate([SUMS[3]], "auto")[0]
    assert answer.choice is not None
    assert answer.choice.version == router.version


def test_decisions_and_drift_are_counted(engine, routers):
    router = load_router(routers / "a")
    with background_server(engine, router_seconds=0) as url, client(url) as http:
        assert http.get("/v1/router").json()["drift"] == {}
        assert ask(http, ["zzz qqq xxx"] * 3 + SUMS[:2]).status_code == 200
        shown = metrics(http)
        assert shown['toolkit_routed_total{expert="base",reason="out of scope"}'] == 3
        assert shown['toolkit_routed_total{expert="plain",reason="best"}'] == 2
        assert shown[f'toolkit_router_version{{version="{router.version}"}}'] == 1
        assert not any(name.startswith("toolkit_router_drift") for name in shown)
        prompts = ["zzz qqq xxx"] * 3 + SUMS[:2]
        for first in range(0, FEWEST, 50):
            many = [f"{'other' * (i % 7)} things {i}" for i in range(first, first + 50)]
            prompts += many
            assert ask(http, many, max_tokens=1).status_code == 200
        shown, entry = metrics(http), http.get("/v1/router").json()
        expected = router.drift(prompts)
        assert expected["score"] > 0.25
        assert entry["drift"] == pytest.approx(expected, rel=1e-3)
        for name, value in expected.items():
            assert shown[f'toolkit_router_drift{{measure="{name}"}}'] == pytest.approx(value, rel=1e-3)
        counts = Counter(choice.expert for choice in router.choose(prompts))
        assert entry["decisions"] == counts
        assert sum(entry["reasons"].values()) == len(prompts)
        assert (entry["kind"], entry["experts"], entry["refused"]) == ("naive_bayes", ["plain", "wide"], None)


def test_labels_of_many_experts_are_bounded_and_keep_their_names(engine):
    engine.routing.decisions.update({(f"e{i}", "best"): 2 for i in range(MOST_MODELS + 50)})
    first = _series(Metrics(engine))
    assert len(first) == MOST_MODELS + 1
    assert first["other"] == 100
    engine.routing.decisions.update({("new", "best"): 1, ("e3", "best"): 1})
    again = _series(Metrics(engine))
    assert set(again) == set(first)
    assert (again["other"], again["e3"]) == (101, 3)


def _series(metrics: Metrics) -> dict[str, float]:
    found = re.findall(r'^toolkit_routed_total{expert="(\w+)",reason="best"} (\S+)$', metrics.text().decode(), re.M)
    return {name: float(value) for name, value in found}


def replace_atomically(new: Path, folder: Path) -> None:
    load_router(new).save(folder, overwrite=True)


def replace_file_by_file(new: Path, folder: Path) -> None:
    for name in ("router.json", "router.safetensors"):
        shutil.copyfile(new / name, folder / name)
        time.sleep(0.03)


@pytest.mark.parametrize("replace", [replace_atomically, replace_file_by_file])
def test_every_answer_is_wholly_of_one_router_while_they_are_replaced(replace, engine, folder, routers):
    known = {router.version: router for router in (load_router(routers / "a"), load_router(routers / "b"))}
    expected = {
        version: {prompt: router.choose([prompt])[0] for prompt in (SUMS[5], WORDS[5])}
        for version, router in known.items()
    }
    seen: list[tuple[str, dict]] = []
    done = threading.Event()

    def keep_asking() -> None:
        with client(url) as http:
            while not done.is_set():
                for prompt in (SUMS[5], WORDS[5]):
                    response = ask(http, prompt, max_tokens=1)
                    seen.append((prompt, response.json()))

    with background_server(engine, router_seconds=0.02) as url, client(url) as http:
        threads = [threading.Thread(target=keep_asking) for _ in range(3)]
        for thread in threads:
            thread.start()
        for round_ in range(6):
            name = "ba"[round_ % 2]
            replace(routers / name, folder)
            version = load_router(routers / name).version
            wait_for(lambda version=version: http.get("/v1/router").json()["version"] == version)
        done.set()
        for thread in threads:
            thread.join()
        assert metrics(http)["toolkit_router_reloads_total"] == 6
    engine.check()
    assert {answer["routing"]["version"] for _, answer in seen} == set(known)
    for prompt, answer in seen:
        choice = expected[answer["routing"]["version"]][prompt]
        assert answer["model"] == answer["routing"]["expert"] == choice.expert
        assert answer["routing"]["scores"] == pytest.approx(choice.scores, rel=1e-4)


def wait_for(done, seconds=10.0) -> None:
    deadline = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)


def spoil(folder: Path) -> None:
    path = folder / "router.safetensors"
    path.write_bytes(path.read_bytes()[:-7])


def mix(folder: Path, routers: Path) -> None:
    shutil.copyfile(routers / "b" / "router.json", folder / "router.json")


def blind(folder: Path) -> None:
    """Name an encoder that is not there."""
    config = json.loads((folder / "router.json").read_text())
    config["features"] = {"embedding": {"model": str(folder / "nothing")}}
    del config["version"]
    (folder / "router.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda folder, routers: spoil(folder), "router.safetensors"),
        (mix, "half written, or changed by hand"),
        (lambda folder, routers: blind(folder), "no such folder"),
        (lambda folder, routers: replace_atomically(routers / "unserved", folder), "nobody, which are not served"),
        (lambda folder, routers: replace_atomically(routers / "homeless", folder), "nobody, which are not served"),
        (lambda folder, routers: (folder / "router.json").write_text("{"), "router.json"),
    ],
    ids=["truncated", "mixed", "blind", "unserved", "homeless", "no JSON"],
)
def test_what_cannot_be_used_is_refused_and_the_old_router_goes_on(change, reason, engine, folder, routers, caplog):
    before = engine.routing.version
    with background_server(engine, router_seconds=0.02) as url, client(url) as http:
        with caplog.at_level(logging.INFO, logger="toolkit.serving"):
            change(folder, routers)
            wait_for(lambda: http.get("/v1/router").json()["refused"])
            time.sleep(0.2)
        entry = http.get("/v1/router").json()
        assert reason in entry["refused"]
        assert entry["version"] == before
        records = [record for record in caplog.records if record.getMessage() == "router refused"]
        assert len(records) == 1, "once, not at every look"
        assert records[0].fields["version"] == before
        assert reason in records[0].fields["reason"]
        assert metrics(http)["toolkit_router_refusals_total"] == 1
        assert ask(http, WORDS[0]).json()["routing"] | {"scores": 0, "margin": 0} == {
            "expert": "wide",
            "reason": "best",
            "version": before,
            "scores": 0,
            "margin": 0,
        }
        shutil.rmtree(folder)
        shutil.copytree(routers / "b", folder)
        wait_for(lambda: http.get("/v1/router").json()["version"] != before)
        assert http.get("/v1/router").json()["refused"] is None
        assert ask(http, WORDS[0]).json()["model"] == "plain"


def test_a_folder_is_read_when_it_has_come_to_rest(engine, folder, routers):
    loop = EngineLoop(engine)
    loop.start()
    try:
        watch = RouterWatch(loop, 60)
        before = engine.routing.version
        watch.look()
        watch.look()
        assert (engine.routing.version, engine.routing.num_reloads) == (before, 0)
        replace_atomically(routers / "b", folder)
        watch.look()
        assert engine.routing.version == before, "it may still be written"
        watch.look()
        assert engine.routing.version == load_router(routers / "b").version
        shutil.rmtree(folder)
        watch.look()
        watch.look()
        assert engine.routing.num_refused == 0, "a folder that is gone says nothing new"
    finally:
        loop.stop()


def test_policy_changed_by_hand_is_taken_without_its_version(engine, folder):
    loop = EngineLoop(engine)
    loop.start()
    try:
        watch = RouterWatch(loop, 60)
        config = json.loads((folder / "router.json").read_text())
        config["policy"] = {"costs": {"wide": 1.0}, "price": 1e6}
        del config["version"]
        (folder / "router.json").write_text(json.dumps(config))
        watch.look()
        watch.look()
        assert engine.routing.num_reloads == 1
        assert engine.generate([WORDS[0]], "auto")[0].model == "plain"
    finally:
        loop.stop()


def test_router_that_cannot_decide_is_refused_at_the_start(base, loras):
    state = naive_bayes.fit(np.eye(4, dtype=np.float32), _two(), naive_bayes.Params())
    spec = FeaturesSpec(embedding=EmbeddingSpec(model="by hand"))
    broken = Router(
        "naive_bayes",
        ["plain", "wide"],
        state,
        Features(spec, embedder=lambda texts: np.ones((len(texts), 3), np.float32)),
    )
    with pytest.raises(CheckpointError, match="the embedding has 3 numbers, the router was fitted on 4"):
        Engine(str(base), loras, broken, limits=LIMITS)


def test_fallback_has_to_be_served_where_it_can_come(base, loras, routers):
    names = {name: loras[name] for name in ("plain", "wide", "few")}
    with pytest.raises(SpecError, match="chooses among nobody, which are not served"):
        Engine(str(base), names, routers / "homeless", limits=LIMITS)
    router = load_router(routers / "a")
    harmless = router.changed(policy=router.policy.model_copy(update={"fallback": "nobody", "max_novelty": None}))
    with Engine(str(base), names, harmless, limits=LIMITS) as engine:
        assert engine.generate([SUMS[0]], "auto")[0].model == "plain"


def _two():
    return labelled(["plain", "wide"], [""] * 4, np.array([0, 0, 1, 1]))


def test_a_router_in_memory_has_no_folder_to_look_after(base, loras, routers):
    with Engine(str(base), loras, load_router(routers / "a"), limits=LIMITS) as engine:
        assert engine.routing.source is None
        with background_server(engine, router_seconds=0.02) as url, client(url) as http:
            assert "router watch" not in {thread.name for thread in threading.enumerate()}
            assert ask(http, SUMS[0]).json()["model"] == "plain"
    with Engine(str(base), loras, limits=LIMITS) as engine, background_server(engine) as url, client(url) as http:
        assert http.get("/v1/router").status_code == 404


def test_a_thousand_experts_cost_less_than_five_milliseconds():
    """A whole choice: scores, policy, shares; the features are a look-up."""
    rng = np.random.default_rng(0)
    owner = np.repeat(np.arange(1000), 5)
    x = (rng.standard_normal((5000, 128)) + rng.standard_normal((1000, 128))[owner]).astype(np.float32)
    examples = labelled([f"e{i}" for i in range(1000)], [""] * 5000, owner)
    state = naive_bayes.fit(x, examples, naive_bayes.Params())
    features = Features(FeaturesSpec(embedding=EmbeddingSpec(model="m")), embedder=lambda texts: x[: len(texts)])
    router = Router("naive_bayes", examples.experts, state, features)
    assert router.choose(["?"])[0].expert == "e0"
    times = []
    for _ in range(30):
        start = time.perf_counter()
        router.choose(["?"])
        times.append(time.perf_counter() - start)
    assert min(times) < 5e-3
