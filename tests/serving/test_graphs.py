"""Captured decode steps: replayed for other requests and adapters, they give what the model alone gives."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="needs triton, which exists for Linux on x86-64")

from tests import tiny
from tests.kernels.harness import INTERPRETED
from tests.kernels.replay import Replay
from tests.serving.test_engine import prompts_of, same_but_for_ties
from toolkit.serving import graphs
from toolkit.serving.engine import Engine
from toolkit.serving.request import Sampling
from toolkit.serving.spec import Limits

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="repeats launches on a CPU")


TARGETS = ["q_proj", "v_proj", "down_proj"]
KINDS = {
    "first": {"target_modules": TARGETS},
    "second": {"r": 7, "target_modules": TARGETS},
    "dora": {"r": 3, "use_dora": True, "target_modules": TARGETS},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sizes = {"num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 48}
    return tiny.save_model(tiny.llama(**sizes), tmp_path_factory.mktemp("base") / "base")


@pytest.fixture(scope="module")
def loras(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("loras")
    return {name: tiny.save_lora(base, root / name, seed=i, **kind) for i, (name, kind) in enumerate(KINDS.items())}


@pytest.fixture
def captured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let engines capture on the CPU, with few programs: the interpreter runs those without work too."""
    monkeypatch.setattr(graphs, "capture_for", lambda device: Replay)
    monkeypatch.setattr("toolkit.kernels.decode_attention.triton_form._programs", lambda generation: 6)


def asked(engine: Engine, models: list[str], seed: int, count: int = 5) -> list[tuple[str, list[int], list[int]]]:
    prompts = prompts_of(len(models), seed, 12)
    answers = engine.generate(prompts, models, Sampling(max_tokens=count, ignore_eos=True))
    engine.check()
    return [(model, prompt, answer.tokens) for model, prompt, answer in zip(models, prompts, answers, strict=True)]


def check(found, base, adapters):
    models = {name: tiny.load_merged(base, adapters.get(name)) for name in {name for name, _, _ in found}}
    for name, prompt, tokens in found:
        expected = tiny.greedy(models[name], prompt, len(tokens))
        assert same_but_for_ties(tokens, expected, models[name], prompt), name


def test_one_graph_serves_other_requests_and_adapters(base, loras, captured):
    limits = Limits(max_requests=3, cache_tokens=400, page_size=4)
    with Engine(base, loras, limits=limits, impl="triton") as engine:
        held = engine.runner.graphs
        found = asked(engine, ["first", "base", "second"], 0)
        assert held.num_captured == 1
        replayed = held.num_replayed
        found += asked(engine, ["second", "second", "base"], 1)
        found += asked(engine, ["first"] * 3, 2)
        assert held.num_replayed > replayed + 5
        assert held.num_captured == 1
        found += asked(engine, ["base"] * 3, 3)
        found += asked(engine, ["dora", "first", "dora"], 4)
        assert held.num_captured == 3
    check(found, base, loras)


def test_compositions(base, loras, captured):
    prompts, sampling = prompts_of(2, 5, 9), Sampling(max_tokens=6, ignore_eos=True)
    models, limits = ["first:0.5+second:0.25", "second"], Limits(max_requests=2, cache_tokens=400, page_size=4)
    found = []
    for impl in ("triton", "torch"):
        with Engine(base, loras, limits=limits, impl=impl) as engine:
            found.append([answer.tokens for answer in engine.generate(prompts, models, sampling)])
            replayed = engine.runner.graphs.num_replayed if engine.runner.graphs else 0
            assert (replayed > 2) == (impl == "triton")
    assert found[0] == found[1]


def test_adapters_come_and_go_under_a_graph(base, loras, captured):
    limits = Limits(max_requests=2, cache_tokens=400, page_size=4)
    with Engine(base, {"a": loras["first"]}, limits=limits, impl="triton") as engine:
        found = asked(engine, ["a", "a"], 0)
        engine.add_adapter("b", loras["second"])
        found += asked(engine, ["b", "a"], 1)
        engine.remove_adapter("a")
        found += asked(engine, ["b", "b"], 2)
        assert engine.runner.graphs.num_replayed > 4
    check(found, base, {"a": loras["first"], "b": loras["second"]})


def test_a_model_that_reads_its_numbers_is_served_without_graphs(base, captured, caplog):
    with Engine(base, limits=Limits(max_requests=2, cache_tokens=300), impl="triton") as engine:
        layer = engine.model.model.layers[0]
        layer.register_forward_hook(lambda *_: torch.ones(1).item() and None)
        found = asked(engine, ["base"], 0)
        assert "item cannot be captured" in engine.runner.graphs.refused
        assert engine.runner.graphs.num_replayed == 0
    assert "decode steps are not captured as graphs" in caplog.text
    check(found, base, {})


def test_graphs_can_be_switched_off(base, captured):
    with Engine(base, limits=Limits(decode_graphs=False, cache_tokens=300)) as engine:
        assert engine.runner.graphs is None


@pytest.mark.parametrize(
    ("wanted", "rows"), [(1, 1), (2, 2), (3, 3), (4, 4), (5, 6), (7, 8), (9, 12), (33, 48), (49, 64)]
)
def test_rows_of_a_graph(wanted, rows):
    assert graphs.row_count(wanted) == rows
