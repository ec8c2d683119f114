"""The toolkit's own methods, and compositions of adapters, behind the engine: each answer is that of the model alone.

The oracle of an answer is PEFT's model with the adapter, in transformers' own greedy generation.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import PreTrainedModel

from tests import tiny
from tests.adapters.laws import attach, bits, config_of, randomise, same_bits, save
from tests.adapters.test_laws import NAMES, example
from tests.serving.test_engine import ENOUGH, prompts_of, same_but_for_ties
from toolkit.adapters.compose import compose
from toolkit.adapters.methods.vl_adapter import VlAdapterLayer, tasks
from toolkit.errors import UnsupportedError
from toolkit.models.load import quiet_transformers
from toolkit.serving.engine import Engine
from toolkit.serving.own_pass import OwnPass
from toolkit.serving.request import Sampling
from toolkit.serving.spec import Limits

COMPOSED = {"scalearn", "adapter_fusion", "composition"}
"""Their sources would be new adapters here, which change nothing; `TREES` has them with sources that do."""

TREES: dict[str, Any] = {
    "lora_average": {"average": ["lora", "other"], "weights": [0.8, 0.5]},
    "scalearn_loras": {"fuse": ["lora", "other"], "by": "scalearn", "start": 0.7},
    "fusion": {"fuse": ["lora", "other"], "by": "adapter_fusion"},
    "average": {"average": ["bottleneck", "lora"], "weights": [0.9, 0.6]},
    "stack": {"stack": ["bottleneck", {"average": ["side", "lora"]}]},
    "stack_prefix": {"stack": ["bottleneck", "prefix"]},
    "fuse": {"fuse": ["bottleneck", "side", "lora"], "by": "scalearn_uniform", "start": 0.5},
    "attention_fuse": {"fuse": ["bottleneck", "side"], "by": "adapter_fusion"},
}
SOURCES = {
    "lora": ("lora", {"r": 3, "target_modules": ["q_proj", "down_proj"]}),
    "other": ("lora", {"r": 2, "target_modules": ["q_proj", "up_proj"]}),
    "bottleneck": ("bottleneck", {"size": 4, "variant": "houlsby"}),
    "side": ("parallel_adapter", {"size": 5, "activation": "gelu"}),
    "prefix": ("mix_and_match", {"size": 4, "prefix": 3}),
}
TASKS = {
    "adapter_tasks": {"n_tasks": 3, "size": 5},
    "compacter_tasks": {"n_tasks": 3, "size": 8, "kind": "compacter", "share": "down"},
    "hyperformer": {"n_tasks": 3, "size": 5, "kind": "hyperformer"},
}

AS_LORA = {"mos", "hydra_lora", "mhr_z", "lora_average", "scalearn_loras"}
APART = {"lst", "unipt", "parscale", "mix_and_match", "stack_prefix"}
"""What cannot run with the pages of the cache."""


@pytest.fixture(scope="module")
def folders(base, tmp_path_factory) -> dict[str, str]:
    """An adapter of every kind, with random numbers in it, by name."""
    root = tmp_path_factory.mktemp("adapters")
    found = {}
    for name in (name for name in NAMES if name not in COMPOSED):
        model = attach(tiny.llama(), name, **example(name).config)
        randomise(model, strength=0.3)
        found[name] = str(save(model, root / name))
    for name, (method, fields) in SOURCES.items():
        model = attach(tiny.llama(), method, **fields)
        randomise(model, seed=len(name), strength=0.3)
        save(model, root / f"source_{name}")
    for name, tree in TREES.items():
        used = {source: str(root / f"source_{source}") for source in SOURCES if f"'{source}'" in repr(tree)}
        model = compose({"base": str(base), "sources": used, "compose": tree})
        for key, value in model.named_parameters():
            if "fuse_" in key and "scale" not in key:
                value.data += torch.randn(value.shape, generator=torch.Generator().manual_seed(3)) * 0.2
        found[name] = str(save(model, root / name))
    for name, fields in TASKS.items():
        model = attach(tiny.llama(), "vl_adapter", **fields)
        randomise(model, strength=0.3)
        save(model, root / name)
        found |= {f"{name}_{task}": f"{root / name}#{task}" for task in (0, 2)}
    return found


@pytest.fixture(scope="module")
def alone(base, folders) -> Callable[[str], Any]:
    """The model that a name means, without an engine."""

    @cache
    def load(name: str) -> Any:
        model = tiny.load_merged(base, None)
        if name == "base":
            return model
        folder, _, task = folders[name].partition("#")
        adapted = PeftModel.from_pretrained(model, folder).eval()
        for layer in (m for m in adapted.modules() if isinstance(m, VlAdapterLayer) and task):
            layer.tasks = torch.tensor([int(task)])
        return adapted

    return load


def check(engine: Engine, alone: Callable[[str], Any], names: list[str], seed: int = 4) -> None:
    prompts = prompts_of(len(names), seed=seed, longest=30)
    answers = engine.generate(prompts, names, Sampling(max_tokens=ENOUGH, ignore_eos=True))
    for prompt, name, answer in zip(prompts, names, answers, strict=True):
        expected = tiny.greedy(alone(name), prompt, ENOUGH)
        assert same_but_for_ties(answer.tokens, expected, alone(name), prompt), name
        assert name == "base" or expected != tiny.greedy(alone("base"), prompt, ENOUGH), name
    engine.check()
    assert engine.scheduler.pool.num_free == engine.scheduler.pool.num_pages


@pytest.mark.parametrize(
    "limits",
    [
        Limits(),
        Limits(max_batch_tokens=9, max_requests=5, page_size=3, cache_tokens=150),
        pytest.param(
            Limits(max_requests=9, page_size=4, cache_tokens=160, swap_bytes=1_000_000), marks=pytest.mark.slow
        ),
    ],
    ids=["roomy", "tight", "swapped"],
)
def test_every_kind_in_one_batch(limits, base, folders, alone):
    with Engine(str(base), folders, limits=limits) as engine:
        check(engine, alone, ["base", *folders, "lst", "bottleneck", "fuse", "parscale", "base"])
        assert limits == Limits() or engine.scheduler.num_preemptions


def test_says_how_each_is_served(base, folders):
    with Engine(str(base), folders) as engine:
        ways = {name: info.description for name, info in engine.adapters.infos.items()}
    assert {name for name, way in ways.items() if way.endswith("with caches of their own")} == APART
    assert {name for name, way in ways.items() if " as LoRA, " in way} == AS_LORA
    merged = {name for name, way in ways.items() if way.endswith(" modules merged")}
    assert {name for name in NAMES if name not in COMPOSED and example(name).folds} <= merged | AS_LORA
    in_a_pass = {name for name, way in ways.items() if way.endswith("in a pass of its own")}
    assert in_a_pass == set(folders) - APART - AS_LORA - merged
    assert ways["hyperformer_2"] == "task 2 of VL_ADAPTER, in a pass of its own"


def test_requests_of_one_adapter_share_a_pass_and_pages(base, folders, alone, monkeypatch):
    """Three requests that begin alike run through the adapter's model together, and compute the beginning once."""
    seen = []
    prompts = [[*range(40), last] for last in (1, 2, 3)]
    with Engine(str(base), folders, limits=Limits(page_size=4)) as engine:
        own = engine.adapters
        engine.generate([prompts[0]], "fuse", Sampling(max_tokens=1))
        found = engine.adapters.own_pass(own.mix([("fuse", 1.0)]))
        assert isinstance(found, OwnPass)
        hook = found.model.register_forward_pre_hook(
            lambda _, args, kwargs: seen.append(kwargs["input_ids"].shape), with_kwargs=True
        )
        answers = engine.generate(prompts, "fuse", Sampling(max_tokens=4, ignore_eos=True))
        hook.remove()
    assert seen[0] == (1, 3)  # the last token of each: all before are in pages
    assert seen[1:] == [(1, 3)] * 3
    for prompt, answer in zip(prompts, answers, strict=True):
        assert answer.tokens == tiny.greedy(alone("fuse"), prompt, 4)


def test_apart_requests_keep_their_caches_and_share_no_pages(base, folders, alone):
    """One token a step, though two requests begin alike; the cache goes with the request."""
    prompt, seen = list(range(30)), []
    with Engine(str(base), folders, limits=Limits(page_size=4)) as engine:
        engine.generate([prompt], "lst", Sampling(max_tokens=1))
        own = engine.adapters.own_pass(engine.adapters.mix([("lst", 1.0)]))
        assert own is not None
        hook = own.model.register_forward_pre_hook(
            lambda _, args, kwargs: seen.append(kwargs["input_ids"].shape[1]), with_kwargs=True
        )
        (answer,) = engine.generate([prompt], "lst", Sampling(max_tokens=5, ignore_eos=True))
        hook.remove()
        assert not len(own._caches)
    assert seen == [30, 1, 1, 1, 1]
    assert answer.tokens == tiny.greedy(alone("lst"), prompt, 5)


def test_scores_of_a_prompt(base, folders, alone):
    """Log-probabilities of a prompt's tokens, from a pass with pages and from one with a cache, in chunks."""
    prompt = prompts_of(1, seed=8, longest=40)[0]
    for name in ("bottleneck", "parscale"):
        with torch.inference_mode():
            expected = alone(name)(torch.tensor([prompt])).logits[0].log_softmax(-1)
        with Engine(str(base), folders, limits=Limits(max_batch_tokens=7, max_requests=2)) as engine:
            ticket = engine.submit(prompt, name, Sampling(max_tokens=1, prompt_logprobs=0))
            while engine.step():
                pass
        found = [score.logprob for score in ticket.request.prompt_logprobs]
        wanted = [float(expected[i, token]) for i, token in enumerate(prompt[1:])]
        assert found == pytest.approx(wanted, abs=1e-4)


def test_vectors(base, folders, alone):
    """`using` gives the model with the adapter, as embeddings and evaluations need it."""
    ids = torch.tensor([prompts_of(1, seed=8)[0]])
    with Engine(str(base), folders) as engine:
        for name in ("bottleneck", "unipt", "mos"):
            with engine.using(name) as model, torch.inference_mode():
                found = model(ids).logits
            with torch.inference_mode():
                torch.testing.assert_close(found, alone(name)(ids).logits, rtol=1e-4, atol=1e-4)


def test_model_of_the_users_is_left_alone(base, folders):
    model = tiny.load_merged(base, None)
    before, trained = bits(model), [value.requires_grad for value in model.parameters()]
    tokenizer = tiny.build_tokenizer(tiny.CONTEXT)
    with Engine((model, tokenizer), {n: folders[n] for n in ("lst", "fuse")}) as engine:
        engine.generate([[1, 2]] * 2, ["lst", "fuse"], Sampling(max_tokens=2))
        shared = engine.adapters.own_pass(engine.adapters.mix([("fuse", 1.0)]))
        assert shared is not None
        mine = {value.data_ptr() for value in model.parameters()}
        assert {v.data_ptr() for n, v in shared.model.named_parameters() if "composition" not in n} == mine
    assert same_bits(bits(model), before)
    assert [value.requires_grad for value in model.parameters()] == trained
    assert not any(isinstance(module, BaseTunerLayer) for module in model.modules())
    assert model.config._attn_implementation == "sdpa"


def test_cannot_be_weighted(base, folders):
    from toolkit.errors import RequestError

    with Engine(str(base), {name: folders[name] for name in ("lst", "mos", "fuse")}) as engine:
        for name in ("lst:0.5", "fuse+mos"):
            with pytest.raises(RequestError, match="neither be weighted nor combined"):
                engine.submit([1], name)
        engine.submit([1], "mos:0.5")  # a LoRA can


def test_refused_with_the_reason(base, folders, tmp_path):
    hyper = folders["hyperformer_0"].partition("#")[0]
    sources = {name: str(Path(folders["fuse"]).parent / f"source_{name}") for name in ("bottleneck", "side")}
    save(compose({"base": str(base), "sources": sources, "compose": {"parallel": list(sources)}}), tmp_path / "rows")
    model = attach(tiny.llama(hidden_size=64), "lst", reduction=4)
    save(model, tmp_path / "wide")
    for folder, reason in (
        (hyper, rf"has 3 tasks; name one, such as {hyper}#0"),
        (f"{hyper}#3", "no task '3'; its tasks are 0, 1, 2"),
        (f"{folders['mos']}#1", "no task '1'"),
        (tmp_path / "rows", "a batch of 1 rows cannot be shared out among 2 parallel adapters"),
        (tmp_path / "wide", "LST does not fit the model"),
    ):
        with pytest.raises(UnsupportedError, match=reason):
            Engine(str(base), {"x": str(folder)}).close()


def test_what_differs_in_steps_is_refused(base, folders, monkeypatch):
    """An adapter whose answers depend on how its tokens came is no use, whatever its type."""
    from toolkit.adapters.methods.unipt import UniptNetwork

    monkeypatch.setattr(UniptNetwork, "_all", lambda self, target, call, k, source: target)
    monkeypatch.setattr(
        "toolkit.adapters.methods.unipt.visible",
        lambda call, queries, keys, device: torch.ones(1, queries, keys, dtype=torch.bool),
    )
    with pytest.raises(UnsupportedError, match="token by token its logits are off by"):
        Engine(str(base), {"x": folders["unipt"]}).close()


def test_other_architectures(tmp_path):
    """A model with learned positions and transposed linears, and one with a window and capped scores."""
    from tests.serving.test_engine import other_models

    made: dict[str, Any] = {name: model for name, model in other_models().items() if name in ("gpt2", "gemma2")}
    assert len(made) == 2
    for kind, model in made.items():
        base = tiny.save_model(model, tmp_path / kind)
        adapters = {}
        for method in ("bottleneck", "lst", "parscale"):
            with quiet_transformers():
                fresh: Any = get_peft_model(type(model).from_pretrained(base), config_of(method, **fields(method)))
            randomise(fresh, strength=0.3)
            adapters[method] = str(save(fresh, tmp_path / f"{kind}_{method}"))
        with Engine(str(base), adapters) as engine:
            prompts = prompts_of(3, seed=1, longest=20)
            answers = engine.generate(prompts, list(adapters), Sampling(max_tokens=8, ignore_eos=True))
        for prompt, answer, folder in zip(prompts, answers, adapters.values(), strict=True):
            attention = "eager" if kind == "gemma2" else "sdpa"
            with quiet_transformers():
                plain: PreTrainedModel = type(model).from_pretrained(base, attn_implementation=attention)
                adapted: Any = PeftModel.from_pretrained(plain, folder).eval()
            assert same_but_for_ties(answer.tokens, tiny.greedy(adapted, prompt, 8), adapted, prompt), (kind, folder)


def fields(method: str) -> dict[str, Any]:
    return {"bottleneck": {"size": 4}, "lst": {"reduction": 2}, "parscale": {"streams": 2, "prefix": 3}}[method]


def test_command_says_how(base, folders):
    from toolkit.serving.serve import adapters_table

    with Engine(str(base), {"ladder": folders["lst"]}) as engine:
        text = adapters_table(engine).to_markdown()
    assert "LST, one request after another, with caches of their own" in text


def test_tasks_of_a_block_are_those_of_the_engine(base, folders):
    """The task that a name brings is what `with tasks(...)` says in Python."""
    folder = folders["hyperformer_2"].partition("#")[0]
    model = PeftModel.from_pretrained(tiny.load_merged(base, None), folder).eval()
    with tasks(model, [2]):
        expected = tiny.greedy(model, [5, 6, 7], 12)
    with Engine(str(base), folders) as engine:
        (answer,) = engine.generate([[5, 6, 7]], "hyperformer_2", Sampling(max_tokens=12, ignore_eos=True))
    assert answer.tokens == expected
