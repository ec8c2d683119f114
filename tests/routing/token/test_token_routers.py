"""Which experts tokens go to: prototypes, scores and weights against float64, PEFT, and rows one by one."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from peft import ArrowConfig, PolyConfig, create_arrow_model, get_peft_model
from transformers import AutoModelForCausalLM

from tests import tiny
from tests.routing.token.by_hand import arrow_by_hand, changes_of, save_experts, with_routes
from toolkit.adapters.methods.scalearn import ScalearnConfig
from toolkit.errors import CheckpointError, MissingError, SpecError, UnsupportedError
from toolkit.kernels.grouped_lora import Pair
from toolkit.models.load import quiet_transformers
from toolkit.routing.token import mhr
from toolkit.routing.token.experts import read_expert
from toolkit.routing.token.ops import BLOCK
from toolkit.routing.token.router import load_token_router, make_token_router
from toolkit.routing.token.routers import arrow, mixture, phatgoose


@pytest.fixture(scope="module")
def folders(base, tmp_path_factory):
    return save_experts(base, tmp_path_factory.mktemp("experts"))


@pytest.fixture(scope="module")
def experts(folders):
    return {name: read_expert(folder) for name, folder in folders.items()}


def random_pair(rank: int, inputs: int = 40, outputs: int = 24, seed: int = 0) -> Pair:
    generator = torch.Generator().manual_seed(seed)
    return Pair(torch.randn(rank, inputs, generator=generator), torch.randn(outputs, rank, generator=generator))


@pytest.mark.parametrize(
    ("rank", "inputs", "outputs"), [(1, 40, 24), (8, 40, 24), (30, 40, 24), (8, 5, 24), (8, 40, 3)]
)
def test_arrows_prototype_is_the_leading_singular_vector(rank, inputs, outputs):
    pair = random_pair(rank, inputs, outputs)
    change = pair.b_Nr.double().numpy() @ pair.a_rK.double().numpy()
    leading = np.linalg.svd(change)[2][0]
    assert abs(arrow.vector(pair).numpy() @ leading) == pytest.approx(1, abs=1e-6)
    assert np.linalg.norm(change @ arrow.vector(pair).numpy()) == pytest.approx(np.linalg.norm(change, 2), rel=1e-6)


def test_signs_and_scales_of_factors_change_no_prototype():
    pair = random_pair(6)
    turned = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(1)))[0]
    for other in (
        Pair(-pair.a_rK, pair.b_Nr),
        Pair(pair.a_rK * 4, pair.b_Nr * -3),
        Pair(turned @ pair.a_rK, pair.b_Nr @ turned.T),
    ):
        torch.testing.assert_close(arrow.vector(other), arrow.vector(pair), rtol=1e-5, atol=1e-6)
    x, vectors = torch.randn(9, 40), torch.stack([arrow.vector(random_pair(4, seed=s)) for s in range(5)])
    flipped = vectors * torch.tensor([1, -1, -1, 1, -1])[:, None]
    for one, other in zip(
        arrow.route(x, vectors, arrow.Params()), arrow.route(x, flipped, arrow.Params()), strict=True
    ):
        assert torch.equal(one, other)


def test_an_untrained_lora_has_no_direction():
    pair = random_pair(4)
    assert not arrow.vector(Pair(pair.a_rK, torch.zeros_like(pair.b_Nr))).any()


def by_hand(scores: np.ndarray, top_k: int, temperature: float) -> np.ndarray:
    """Return the weight of every expert, `[T, E]`."""
    weights = np.zeros_like(scores)
    for row, own in zip(weights, scores, strict=True):
        best = np.argsort(-own)[:top_k]
        row[best] = np.exp(own[best] / temperature) / np.exp(own[best] / temperature).sum()
    return weights


def standardized(x: np.ndarray) -> np.ndarray:
    return (x - x.mean(1, keepdims=True)) / x.std(1, keepdims=True)


@pytest.mark.parametrize("top_k", [1, 3, 99])
@pytest.mark.parametrize("kind", ["arrow", "phatgoose", "mixture"])
def test_weights_are_the_softmax_over_the_best_scores(kind, top_k):
    module = {"arrow": arrow, "phatgoose": phatgoose, "mixture": mixture}[kind]
    generator = torch.Generator().manual_seed(3)
    x, vectors = torch.randn(11, 64, generator=generator) + 0.5, torch.randn(BLOCK + 5, 64, generator=generator)
    index, weight = module.route(x, vectors, module.Params(top_k=top_k, temperature=0.7))
    assert index.shape == weight.shape == (11, min(top_k, len(vectors)))
    x64, v64 = x.double().numpy(), vectors.double().numpy()
    scores = {
        "arrow": abs(x64 @ v64.T),
        "phatgoose": standardized(x64) @ standardized(v64).T / 8,
        "mixture": x64 @ v64.T,
    }[kind]
    got, expected = torch.zeros(11, len(vectors)).scatter_(1, index, weight), by_hand(scores, top_k, 0.7)
    if kind == "mixture" and top_k == 1:
        expected = by_hand(scores, len(vectors), 0.7) * (expected > 0)
    np.testing.assert_allclose(got, expected, atol=2e-5)


@pytest.mark.parametrize("count", [3, BLOCK - 1, BLOCK, 2 * BLOCK + 1])
@pytest.mark.parametrize("rows", [1, 7, 200])
def test_another_expert_leaves_arrows_scores_bit_for_bit(count, rows):
    pairs = [random_pair(4, inputs=96, seed=seed) for seed in range(count + 1)]
    vectors = torch.stack([arrow.vector(pair) for pair in pairs])
    x = torch.randn(rows, 96, generator=torch.Generator().manual_seed(5))
    assert torch.equal(arrow.products(x, vectors)[:, :-1], arrow.products(x, vectors[:-1]))


def test_experts_work_where_they_have_factors(experts):
    router = make_token_router("arrow", experts, {"top_k": 3})
    assert router.experts == ("one", "two", "three", "four")
    x = torch.randn(20, 48, generator=torch.Generator().manual_seed(0))
    index, weight = router.route("model.layers.0.self_attn.k_proj", x)
    assert set(index.unique().tolist()) <= {0, 1, 3}, "three leaves k alone"
    torch.testing.assert_close(weight.sum(1), torch.ones(20))
    mixed = router.mixture(["model.layers.0.self_attn.q_proj", "no such module"], x)
    assert mixed.shape == (2, 20, 4)
    assert not mixed[1].any()
    assert ((mixed[0] > 0).sum(1) == 3).all()


def test_arrow_is_pefts_where_that_is_exact(base, tmp_path):
    """For LoRAs of rank 1 the power iteration of PEFT's Arrow has nothing to miss."""
    modules = ["q_proj", "v_proj", "down_proj"]
    paths = [
        tiny.save_lora(base, tmp_path / str(i), seed=i, r=1, lora_alpha=3, target_modules=modules) for i in range(5)
    ]
    ids = torch.randint(256, (1, 30), generator=torch.Generator().manual_seed(0))
    with quiet_transformers(), warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("ignore")
        config = ArrowConfig(top_k=2, router_temperature=0.8, rng_seed=0)
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        theirs = create_arrow_model(model, [str(p) for p in paths], config).eval()(ids).logits
    changes = [changes_of(path) for path in paths]
    with torch.inference_mode():
        by_row = with_routes(tiny.load_merged(base, None), changes, arrow_by_hand(2, 0.8))(ids).logits
    router = make_token_router("arrow", {str(i): read_expert(p) for i, p in enumerate(paths)}, {"temperature": 0.8})

    def ours(site, x, own):
        index, weight = router.route(site, x[None])
        return dict(zip(index[0].tolist(), weight[0].tolist(), strict=True))

    with torch.inference_mode():
        routed = with_routes(tiny.load_merged(base, None), changes, ours)(ids).logits
    torch.testing.assert_close(theirs, by_row, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(routed, by_row, rtol=1e-5, atol=1e-4)


def test_a_saved_router_is_the_same_router(experts, folders, tmp_path):
    router = make_token_router("arrow", experts, {"top_k": 3})
    router.save(tmp_path / "router")
    again = load_token_router(tmp_path / "router")
    assert again.version == router.version
    assert again.bound(router.keys).version == router.version
    assert again.with_params({"top_k": 1}).version != router.version
    with pytest.raises(SpecError, match="top_k"):
        again.with_params({"top_k": -1})
    with pytest.raises(CheckpointError, match="two is another adapter"):
        again.bound([router.keys[0], "other", *router.keys[2:]])
    with pytest.raises(MissingError, match=r"neither token_router\.json"):
        load_token_router(folders["one"])


def test_identity_is_that_of_experts_vectors_and_settings(experts):
    router = make_token_router("arrow", experts, {})
    some = dict(list(experts.items())[:3])
    others = [
        make_token_router("arrow", some, {}),
        make_token_router("arrow", experts, {"temperature": 2}),
        make_token_router("arrow", {**experts, "one": experts["two"]}, {}),
    ]
    assert len({r.version for r in (router, *others)}) == 4
    assert make_token_router("arrow", dict(experts), {"top_k": 2}).version == router.version


def test_only_plain_loras_are_experts(loras, base, tmp_path):
    for folder in (loras["dora"], tiny.save_lora(base, tmp_path / "e", target_modules=["embed_tokens", "q_proj"])):
        with pytest.raises(UnsupportedError, match="only add a product"):
            read_expert(folder)


@pytest.mark.system("scalearn")
@pytest.mark.parametrize("shared", [False, True])
def test_scalearns_uniform_scales_weight_every_row(shared, base, folders, tmp_path):
    sources = {name: str(folders[name]) for name in ("one", "three")}
    with quiet_transformers():
        config = ScalearnConfig(sources=sources, uniform=True, shared=shared, task_type="CAUSAL_LM")
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for name, value in model.named_parameters():
                if name.endswith(".scale"):
                    value.copy_(torch.randn(value.shape, generator=generator))
        model.save_pretrained(tmp_path / "scaled")
    ids = torch.randint(256, (1, 30), generator=torch.Generator().manual_seed(0))
    router = load_token_router(tmp_path / "scaled")

    def ours(site, x, own):
        index, weight = router.route(site, x[None])
        return dict(zip(index[0].tolist(), weight[0].tolist(), strict=True))

    with torch.inference_mode():
        expected = model.eval()(ids).logits
        changes = [changes_of(folders[name]) for name in router.experts]
        got = with_routes(tiny.load_merged(base, None), changes, ours)(ids).logits
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-3)


@pytest.mark.system("scalearn")
def test_scales_that_are_vectors_are_refused(base, folders, tmp_path):
    with quiet_transformers():
        config = ScalearnConfig(sources={"one": str(folders["one"])}, task_type="CAUSAL_LM")
        get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(tmp_path / "scaled")
    with pytest.raises(UnsupportedError, match="scales are vectors"):
        load_token_router(tmp_path / "scaled")


@pytest.fixture(scope="module")
def poly(base, tmp_path_factory):
    """A POLY adapter of 3 tasks, 3 skills and 2 heads, with random tensors, and its model."""
    folder = tmp_path_factory.mktemp("poly") / "poly"
    with quiet_transformers():
        config = PolyConfig(
            r=3, n_tasks=3, n_skills=3, n_splits=2, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"
        )
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for name, value in model.named_parameters():
                if "poly_" in name:
                    value.copy_(torch.randn(value.shape, generator=generator))
        model.save_pretrained(folder)
    return folder, model.eval()


@pytest.mark.system("mhr")
def test_a_task_of_poly_is_one_lora(base, poly):
    folder, model = poly
    skills = mhr.read_skills(folder)
    ids = torch.randint(256, (1, 12), generator=torch.Generator().manual_seed(0))
    for task in range(3):
        pairs = {site: own.pair(task) for site, own in skills.items()}
        changes = {site: p.scale * p.b_Nr.double() @ p.a_rK.double() for site, p in pairs.items()}
        with torch.inference_mode():
            got = with_routes(tiny.load_merged(base, None), [changes], lambda *_: {0: 1.0})(ids).logits
            expected = model(ids, task_ids=torch.tensor([task])).logits
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=2e-3)


@pytest.mark.system("mhr")
def test_weights_of_tasks_add_up_and_an_unknown_task_takes_the_average(poly):
    skills = next(iter(mhr.read_skills(poly[0]).values()))
    shares = mhr.weights(skills.logits, torch.tensor([2, 0, 2]), 2, 3)
    torch.testing.assert_close(shares.sum(-1), torch.ones(3, 2))
    assert (shares > 0).all()
    torch.testing.assert_close(shares[0], shares[2])
    average = skills.pair("unknown")
    torch.testing.assert_close(average.a_rK, skills.a.mean(1).reshape(-1, 3).T)
    torch.testing.assert_close(average.b_Nr, skills.b.mean(1).transpose(1, 2).reshape(-1, 3))


@pytest.mark.parametrize("task", [None, "3", "-1", "many"])
def test_a_task_that_poly_does_not_have(poly, task):
    with pytest.raises(MissingError, match="#0 to #2"):
        mhr.parse_task(task, mhr.read_skills(poly[0]), "poly")
