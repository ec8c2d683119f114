"""Each token's own mixture of experts, in mixed batches: answers are those of a model whose rows are mixed by hand."""

from __future__ import annotations

import random
import shutil
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from peft import PeftModel, PolyConfig, get_peft_model
from transformers import AutoModelForCausalLM

from tests import tiny
from tests.routing.token.by_hand import RoutedOracle, save_experts
from tests.serving.test_engine import ENOUGH, prompts_of, same_but_for_ties
from tests.serving.test_traffic import LIMITS, drive
from tests.serving.variants import save_kind
from toolkit.adapters.methods.scalearn import ScalearnConfig
from toolkit.errors import MissingError, RequestError, SpecError
from toolkit.kernels.grouped_lora import stacks
from toolkit.models.load import quiet_transformers
from toolkit.routing.token.experts import read_expert
from toolkit.routing.token.gates import write_gate
from toolkit.routing.token.router import TokenRouter, gathered
from toolkit.routing.token.routers import mixture
from toolkit.routing.token.spec import TokenRouterSpec
from toolkit.serving.embed import embed
from toolkit.serving.engine import Engine
from toolkit.serving.request import Sampling
from toolkit.serving.serve import adapters_table, background_server, open_engine
from toolkit.serving.spec import Limits, ServeSpec
from toolkit.specs import load

ARROW = TokenRouterSpec(router="arrow", adapters=["one", "two", "three", "four"], top_k=2, temperature=0.5)
PAIR = TokenRouterSpec(router="arrow", adapters=["four", "one"], top_k=1)
ROUTERS = {"arrow": ARROW, "pair": PAIR}


@pytest.fixture(scope="module")
def experts(base: Path, loras: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Experts of the routers, and two adapters that no router mixes."""
    return save_experts(base, tmp_path_factory.mktemp("experts")) | {n: loras[n] for n in ("plain", "wide")}


@pytest.fixture(scope="module")
def routed(base: Path, experts: dict[str, Path]) -> RoutedOracle:
    return RoutedOracle(base, experts, ROUTERS)


def check(engine: Engine, routed: RoutedOracle, requests: list[tuple[list[int], str]]) -> None:
    sampling = Sampling(max_tokens=ENOUGH, ignore_eos=True)
    answers = engine.generate([p for p, _ in requests], [m for _, m in requests], sampling)
    for (prompt, name), answer in zip(requests, answers, strict=True):
        expected = routed.greedy(name, prompt, ENOUGH)
        assert same_but_for_ties(answer.tokens, expected, routed.model(name), prompt), name
        assert name == "base" or expected != routed.greedy("base", prompt, ENOUGH), name
    engine.check()
    assert engine.scheduler.pool.num_free == engine.scheduler.pool.num_pages


@pytest.mark.parametrize(
    "limits", [Limits(), Limits(max_batch_tokens=9, max_requests=5, page_size=3)], ids=["roomy", "tight"]
)
def test_mixed_batches(limits, base, experts, routed):
    names = ["base", "arrow", "pair", "one", "arrow", "two:0.6+one:0.4", "pair", "arrow"]
    requests = list(zip(prompts_of(len(names), seed=3, longest=30), names, strict=True))
    with Engine(str(base), experts, token_routers=ROUTERS, limits=limits) as engine:
        assert engine.models == ["base", *experts, "arrow", "pair"]
        check(engine, routed, requests)


@pytest.mark.parametrize("impl", ["reference", "torch", "each"])
def test_every_form_gives_the_logits_of_the_rows_mixed_by_hand(impl, base, experts, routed, monkeypatch):
    monkeypatch.setattr(stacks, "MOST_TOGETHER", 1 if impl == "each" else 48)
    ids = prompts_of(1, seed=5, longest=24)[0]
    with (
        Engine(str(base), experts, token_routers=ROUTERS, impl="torch" if impl == "each" else impl) as engine,
        engine.using("arrow") as model,
        torch.inference_mode(),
    ):
        got = model(torch.tensor([ids]), use_cache=False).logits[0]
    with torch.inference_mode():
        expected = routed.model("arrow")(torch.tensor([ids])).logits[0]
    assert (got - expected).abs().max() <= 1e-4 * (expected.max() - expected.min())


@pytest.mark.parametrize("kind", ["tiny pool", "swap"])
def test_random_traffic(kind, base, experts, routed):
    """Chunks, prefixes, preemption and swapping, among requests for adapters and compositions."""
    with Engine(str(base), experts, token_routers=ROUTERS, limits=LIMITS[kind]) as engine:
        met = drive(engine, routed, [*experts, *ROUTERS, *ROUTERS], 90, random.Random(4))
        assert not met.different
        assert met.answers + met.cancelled == 90
        assert engine.scheduler.prefixes is not None
        assert engine.scheduler.prefixes.num_hits > 0
        assert engine.scheduler.num_preemptions > 0
        assert engine.adapters.num_evicted > 0
        assert engine.scheduler.pool.num_free == engine.scheduler.pool.num_pages


def test_rows_of_others_keep_every_bit_beside_routed_rows(base, experts):
    prompts = prompts_of(3, seed=7, longest=20)
    sampling = Sampling(max_tokens=0, prompt_logprobs=5)
    with Engine(str(base), experts, token_routers=ROUTERS) as engine:
        for name in ("base", "one"):
            alone = engine.generate(prompts[:1], name, sampling)[0].prompt_logprobs
            beside = engine.generate(prompts, [name, "arrow", "pair"], sampling)[0].prompt_logprobs
            tokens = [[t for t, _ in score.top] for score in alone]
            assert tokens == [[t for t, _ in score.top] for score in beside]
            for one, other in zip(alone, beside, strict=True):
                assert one.logprob == pytest.approx(other.logprob, abs=1e-5)


def test_routers_share_no_prefix_with_their_adapters_or_each_other(base, experts):
    prompt = prompts_of(1, seed=11, longest=60)[0] + list(range(40))
    few = Sampling(max_tokens=2)
    with Engine(str(base), experts, token_routers=ROUTERS, limits=Limits(page_size=4)) as engine:
        prefixes = engine.scheduler.prefixes
        assert prefixes is not None
        engine.generate([prompt], "one", few)
        engine.generate([prompt], "one:1+four:1", few)
        for name in ROUTERS:
            before = prefixes.num_hits
            engine.generate([prompt], name, few)
            assert prefixes.num_hits == before
            engine.generate([prompt], name, few)
            assert prefixes.num_hits > before


def test_an_adapter_that_is_loaded_anew_gets_a_new_router(base, experts, routed, tmp_path):
    prompt = prompts_of(1, seed=13)[0]
    other = RoutedOracle(base, {**experts, "two": experts["four"]}, {"arrow": ARROW})
    sampling = Sampling(max_tokens=ENOUGH, ignore_eos=True)
    with Engine(str(base), experts, token_routers={"arrow": ARROW}) as engine:
        running = engine.submit(prompt, "arrow", sampling)
        engine.step()
        replaced = tiny.save_lora(base, tmp_path / "two", seed=77)
        engine.add_adapter("two", replaced)
        later = engine.submit(prompt, "arrow", sampling)
        while running.request.finished is None or later.request.finished is None:
            engine.step()
        other = RoutedOracle(base, {**experts, "two": replaced}, {"arrow": ARROW})
        for ticket, oracle in ((running, routed), (later, other)):
            expected = oracle.greedy("arrow", prompt, ENOUGH)
            assert same_but_for_ties(ticket.answer().tokens, expected, oracle.model("arrow"), prompt)
        assert routed.greedy("arrow", prompt, ENOUGH) != other.greedy("arrow", prompt, ENOUGH)
        engine.check()
        assert len(engine.adapters.token_routers._known) == 1, "a router that nobody uses is kept"


def test_vectors_of_texts(base, experts, routed):
    ids = prompts_of(1, seed=17)[0]
    with Engine(str(base), experts, token_routers=ROUTERS) as engine:
        got, _ = embed(engine, ids, "arrow", normalize=False)
    with torch.inference_mode():
        expected = routed.model("arrow").model(torch.tensor([ids])).last_hidden_state[0, -1]
    torch.testing.assert_close(torch.tensor(got), expected, rtol=1e-3, atol=1e-3)


def test_what_cannot_be_mixed_is_refused(base, experts, loras):
    served = {**experts, "dora": loras["dora"], "again": experts["one"]}

    def start(**fields: Any) -> None:
        with Engine(str(base), served, token_routers={"mix": TokenRouterSpec(**fields)}):
            pass

    with pytest.raises(SpecError, match=r"token_routers.mix: .*only add a product"):
        start(router="arrow", adapters=["one", "dora"])
    with pytest.raises(SpecError, match=r"no model 'nobody'"):
        start(router="arrow", adapters=["one", "nobody"])
    with pytest.raises(SpecError, match="again is the same adapter as one"):
        start(router="arrow", adapters=["one", "again"])
    with pytest.raises(SpecError, match=r"did you mean 'arrow'"):
        start(router="arow", adapters=["one"])
    with pytest.raises(SpecError, match="top_k"):
        start(router="arrow", adapters=["one"], top_k=0)
    with pytest.raises(SpecError, match=r"no phatgoose.json beside the adapter"):
        start(router="phatgoose", adapters=["one"])
    with (
        pytest.raises(SpecError, match="an adapter has this name"),
        Engine(str(base), served, token_routers={"one": PAIR}),
    ):
        pass
    with Engine(str(base), served, token_routers=ROUTERS) as engine:
        with pytest.raises(RequestError, match="neither be weighted nor combined"):
            engine.submit([1], "arrow:0.5")
        with pytest.raises(RequestError, match="neither be weighted nor combined"):
            engine.submit([1], "arrow+one")
        with pytest.raises(RequestError, match=r"mixes 'one', so it stays"):
            engine.remove_adapter("one")
        with pytest.raises(RequestError, match="a token router is served under it"):
            engine.add_adapter("arrow", experts["one"])


def by_scores(names: list[str], vectors: dict[str, dict[str, torch.Tensor]], top_k: int, score: Any) -> Any:
    """Return experts and a route by hand: the softmax over the best scores of a row."""

    def route(site: str, x: torch.Tensor, changes: dict[int, torch.Tensor]) -> dict[int, float]:
        scores = {e: float(score(x.double(), vectors[names[e]][site].double())) for e in changes}
        best = sorted(scores, key=lambda e: -scores[e])[:top_k]
        shares = torch.softmax(torch.tensor([scores[e] for e in best], dtype=torch.float64), 0)
        return dict(zip(best, shares.tolist(), strict=True))

    return names, route


def correlation(x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    return torch.corrcoef(torch.stack([x, gate]))[0, 1] * len(x) ** 0.5


def random_gates(folders: dict[str, Path], seed: int) -> dict[str, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    pairs = {name: read_expert(folder).pairs for name, folder in folders.items()}
    return {
        name: {site: torch.randn(pair.a_rK.shape[1], generator=generator) for site, pair in own.items()}
        for name, own in pairs.items()
    }


def test_gates_and_mixtures_in_one_batch(base, experts, tmp_path):
    copies = {name: Path(shutil.copytree(folder, tmp_path / name)) for name, folder in experts.items()}
    gates = random_gates(copies, 1)
    for name, folder in copies.items():
        write_gate(read_expert(folder), "phatgoose", gates[name], {})
    names = ["two", "one", "three"]
    weights = random_gates({name: copies[name] for name in names}, 2)
    keys = tuple(read_expert(copies[name]).key for name in names)
    TokenRouter("mixture", tuple(names), keys, mixture.Params(top_k=2), gathered(weights)).save(tmp_path / "mixture")
    routers = {
        "goose": {"router": "phatgoose", "adapters": list(copies), "top_k": 3},
        "mixture": str(tmp_path / "mixture"),
    }
    by_hand = {
        "goose": by_scores(list(copies), gates, 3, correlation),
        "mixture": by_scores(names, weights, 2, torch.dot),
    }
    oracle = RoutedOracle(base, copies, by_hand)
    requests = list(zip(prompts_of(5, seed=21, longest=25), ["goose", "mixture", "base", "goose", "two"], strict=True))
    with Engine(str(base), copies, token_routers=routers) as engine:
        check(engine, oracle, requests)
    with pytest.raises(SpecError, match="two is another adapter than the one"):
        Engine(str(base), {**copies, "two": copies["four"]}, token_routers={"mixture": str(tmp_path / "mixture")})


@pytest.mark.system("scalearn")
def test_scalearns_scales_over_served_adapters(base, experts, tmp_path):
    sources = {name: str(experts[name]) for name in ("one", "three")}
    with quiet_transformers():
        config = ScalearnConfig(sources=sources, uniform=True, start=0.7, task_type="CAUSAL_LM")
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
        with torch.no_grad():
            for name, value in model.named_parameters():
                if name.endswith(".scale"):
                    value.mul_(torch.tensor([[1.0], [-0.8]]))
        model.save_pretrained(tmp_path / "scaled")
    scaled: Any = model.eval()
    prompts = prompts_of(2, seed=23, longest=20)
    with Engine(str(base), experts, token_routers={"scaled": str(tmp_path / "scaled")}) as engine:
        for prompt, answer in zip(prompts, engine.generate(prompts, "scaled", Sampling(max_tokens=9)), strict=True):
            expected = tiny.greedy(scaled, prompt, 9)
            assert same_but_for_ties(answer.tokens, expected, scaled, prompt)


@pytest.mark.system("mhr")
def test_tasks_of_poly_in_one_batch(base, experts, tmp_path):
    config = PolyConfig(r=3, n_tasks=3, n_skills=2, n_splits=2, target_modules=["q_proj", "o_proj", "up_proj"])
    folder = save_kind(base, tmp_path / "poly", config, seed=3, strength=0.5)
    adapters = {**experts, **{f"task{i}": f"{folder}#{i}" for i in range(3)}}
    with quiet_transformers():
        model = PeftModel.from_pretrained(tiny.load_merged(base, None), str(folder)).eval()
    names = ["task2", "one", "task0", "task1", "task2"]
    prompts = prompts_of(len(names), seed=29, longest=20)
    with Engine(str(base), adapters) as engine:
        assert "task 2 of POLY" in engine.adapters.infos["task2"].description
        answers = engine.generate(prompts, names, Sampling(max_tokens=9, ignore_eos=True, logprobs=0))
        with pytest.raises(MissingError, match="#0 to #2"):
            engine.add_adapter("task3", f"{folder}#3")
    for name, prompt, answer in zip(names, prompts, answers, strict=True):
        if name != "one":
            ids = torch.tensor([prompt + answer.tokens])
            with torch.inference_mode():
                logits = model(ids, task_ids=torch.tensor([int(name[-1])])).logits[0, len(prompt) - 1 : -1]
            scores = logits.log_softmax(-1).gather(1, torch.tensor(answer.tokens)[:, None])[:, 0]
            assert [t.logprob for t in answer.logprobs] == pytest.approx(scores.tolist(), abs=2e-3)
            assert (logits.max(-1).values - logits.gather(1, torch.tensor(answer.tokens)[:, None])[:, 0]).max() < 1e-3


def test_a_server_lists_and_answers_with_a_token_router(base, experts):
    spec = load(
        {"model": str(base), "adapters": {n: str(f) for n, f in experts.items()}, "port": 0}
        | {"token_routers": {"arrow": {"router": "arrow", "adapters": ["one", "two"]}}},
        ServeSpec,
    )
    with open_engine(spec) as engine, background_server(engine) as url, httpx.Client(base_url=url) as client:
        assert "arrow" in [m["id"] for m in client.get("/v1/models").json()["data"]]
        assert client.get("/v1/models/arrow").status_code == 200
        body = {"model": "arrow", "prompt": [1, 2, 3], "max_tokens": 4, "temperature": 0}
        answer = client.post("/v1/completions", json=body).json()
        assert answer["model"] == "arrow"
        assert answer["usage"]["completion_tokens"] > 0
        assert client.delete("/v1/adapters/one").status_code in (400, 409)
        assert "arrow, each token's own of one, two" in adapters_table(engine).to_text()
