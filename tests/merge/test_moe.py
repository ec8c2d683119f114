"""Mixtures of experts: what they compute, what their routers hold, that transformers reads them, what is refused."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from scipy.stats import kstest
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from tests import tiny
from toolkit.checkpoints.reader import open_checkpoint
from toolkit.cli import main
from toolkit.errors import OutputError, SpecError
from toolkit.merge.extract import extract
from toolkit.merge.moe.build import build_moe
from toolkit.merge.moe.gates import alike
from toolkit.merge.moe.noise import normals
from toolkit.merge.moe.plan import make_plan
from toolkit.merge.random import Draws
from toolkit.merge.record import sampled_hash
from toolkit.merge.run import merge
from toolkit.models.hidden import module_inputs
from toolkit.models.load import load_model, quiet_transformers

CLASSES = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
}
SIZES = (
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads"
    " max_position_embeddings bos_token_id eos_token_id pad_token_id initializer_range tie_word_embeddings"
).split()
IDS = torch.randint(0, 250, (2, 40), generator=torch.Generator().manual_seed(0))
LETTERS, DIGITS = ["abc", "a longer one"], ["12 34", "7", "90210 ok"]


def dense(kind: str, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """Return a random dense model whose norms and biases are not their initial ones and zeros."""
    sizes = {name: getattr(tiny.llama_config(), name) for name in SIZES}
    config, model = CLASSES[kind]
    sizes |= {"head_dim": 16} if kind == "qwen3" else {}
    torch.manual_seed(seed)
    made = model(config(**(sizes | changes))).eval()
    with torch.no_grad():
        for name, value in made.named_parameters():
            if "norm" in name or "bias" in name:
                value.add_(0.2 * torch.randn(value.shape))
    return made


def expert(source: object, *positive: str, **more: Any) -> dict[str, Any]:
    given = {"positive_prompts": list(positive)} if positive else {}
    return {"source_model": source if not isinstance(source, Path) else str(source)} | given | more


def build(spec: Mapping[str, Any], out: Path, **options: Any) -> Any:
    return build_moe(spec, out, quiet=True, device="cpu", **options)


def load(folder: Path, **options: Any) -> PreTrainedModel:
    """Load with transformers, which must find every weight and no other."""
    if options.get("dtype") == torch.float64:  # the fast kernels know no such numbers
        options["experts_implementation"] = "eager"
    with quiet_transformers():
        model, told = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **options)
    assert not any(told.values()), told
    return model.eval()


def logits(model: PreTrainedModel, ids: torch.Tensor = IDS) -> torch.Tensor:
    with torch.inference_mode():
        return model(ids).logits


def stored(folder: Path) -> dict[str, torch.Tensor]:
    with open_checkpoint(folder) as checkpoint:
        return {name: checkpoint.tensor(name) for name in checkpoint.tensors}


def config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, list[Path]]:
    """A base and two fine-tunes of every kind."""
    root = tmp_path_factory.mktemp("dense")
    return {kind: [tiny.save_model(dense(kind, i), root / f"{kind}{i}") for i in range(3)] for kind in CLASSES}


def spec_of(models: list[Path], shared: bool = False, per_token: int = 1, **more: Any) -> dict[str, Any]:
    """Return a spec with the fine-tunes as experts, and the base as the shared one."""
    spec: dict[str, Any] = {
        "base_model": str(models[0]),
        "experts": [expert(models[1], *LETTERS), expert(models[2], *DIGITS, negative_prompts=["hello there", "no"])],
        "experts_per_token": per_token,
    }
    return spec | ({"shared_experts": [expert(models[0], "anything")]} if shared else {}) | more


NATIVE = [("llama", False), ("mistral", False), ("qwen2", True), ("qwen3", False), ("llama", True)]
"""Kinds of dense models and shared experts that make each architecture which transformers has itself."""


# Identical experts are the dense model.


@pytest.mark.parametrize(
    ("kind", "changes", "architecture"),
    [
        ("llama", {}, "Mixtral"),
        ("llama", {"tie_word_embeddings": True}, "Mixtral"),
        ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0}}, "Mixtral"),
        ("llama", {"head_dim": 8}, "Mixtral"),
        ("mistral", {"sliding_window": 8}, "Mixtral"),
        ("llama", {}, "Qwen2-MoE"),
        ("mistral", {"sliding_window": 8}, "Qwen2-MoE"),
        ("qwen2", {"tie_word_embeddings": True}, "Qwen2-MoE"),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}, "Qwen2-MoE"),
        ("qwen3", {}, "Qwen3-MoE"),
        ("qwen3", {"attention_bias": True, "rms_norm_eps": 1e-3}, "Qwen3-MoE"),
        ("qwen3", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0}, "Qwen3-MoE"),
    ],
)
@pytest.mark.parametrize("per_token", [1, 2, 3])
def test_identical_experts_are_the_dense_model(kind, changes, architecture, per_token, tmp_path):
    """Their weights sum to one, whatever the router says; a shared expert has no effect at scale 0."""
    model = dense(kind, **changes)
    folder = tiny.save_model(model, tmp_path / "dense")
    spec = {
        "base_model": str(folder),
        "experts": [expert(folder, text) for text in ("abc", "12 34", "hello")],
        "experts_per_token": per_token,
        "architecture": architecture,
    }
    if architecture == "Qwen2-MoE":
        spec["shared_experts"] = [expert(folder, "anything", residual_scale=0)]
    result = build(spec, tmp_path / "out")
    assert result.numbers["architecture"] == architecture
    assert any("the same model" in note for note in result.numbers["notes"])
    torch.testing.assert_close(logits(load(tmp_path / "out")), logits(model), rtol=0, atol=2e-5)


def test_what_the_base_config_leaves_out_is_written_out(tmp_path):
    """Llama's defaults are not Mixtral's: epsilon, rotary base, key-value heads, context."""
    model = dense("llama", num_key_value_heads=4)
    folder = tiny.save_model(model, tmp_path / "dense")
    written = config(folder)
    for key in ("rms_norm_eps", "rope_parameters", "num_key_value_heads", "head_dim", "max_position_embeddings"):
        del written[key]
    (folder / "config.json").write_text(json.dumps(written))
    spec = {"base_model": str(folder), "experts": [expert(folder)] * 2, "gate_mode": "random"}
    build(spec, tmp_path / "out")
    torch.testing.assert_close(logits(load(tmp_path / "out")), logits(model), rtol=0, atol=2e-5)
    got = config(tmp_path / "out")
    assert (got["rms_norm_eps"], got["rope_theta"], got["max_position_embeddings"]) == (1e-6, 10000.0, 2048)


def test_old_configs_keep_their_rotary_scaling(tmp_path):
    scaling = {"rope_type": "linear", "factor": 4.0}
    model = dense("llama", rope_parameters=scaling | {"rope_theta": 300.0})
    folder = tiny.save_model(model, tmp_path / "dense")
    written = config(folder)
    del written["rope_parameters"]
    written |= {"rope_theta": 300.0, "rope_scaling": {"type": "linear", "factor": 4.0}}
    (folder / "config.json").write_text(json.dumps(written))
    build({"base_model": str(folder), "experts": [expert(folder)] * 2, "gate_mode": "random"}, tmp_path / "out")
    torch.testing.assert_close(logits(load(tmp_path / "out")), logits(model), rtol=0, atol=2e-5)
    got = config(tmp_path / "out")
    assert got["rope_theta"] == 300.0
    assert scaling.items() <= got["rope_scaling"].items()


# Different experts: a brute-force mixture of the dense models' own MLPs.


class Brute(nn.Module):
    """A mixture of whole MLPs, every one of them computed for every token, in float64."""

    def __init__(self, mlps: list[nn.Module], router: torch.Tensor, per_token: int) -> None:
        super().__init__()
        self.mlps, self.router, self.per_token = mlps, router, per_token
        self.shared: list[tuple[nn.Module, torch.Tensor | None]] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scores = (x @ self.router.T).softmax(-1)
        chosen = scores >= scores.topk(self.per_token).values[..., -1:]
        weights = scores * chosen / (scores * chosen).sum(-1, keepdim=True)
        out = sum(weights[..., i, None] * mlp(x) for i, mlp in enumerate(self.mlps))
        for mlp, gate in self.shared:
            out = out + (1.0 if gate is None else (x @ gate.T).sigmoid()) * mlp(x)
        return out


def brute(models: list[Path], out: Path, per_token: int, shared: bool, gated: bool = True) -> PreTrainedModel:
    """Return the dense base with its MLPs replaced by mixtures of those of the fine-tunes."""
    base, *experts = (AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval() for folder in models)
    held = {name.replace("block_sparse_moe", "mlp"): value.double() for name, value in stored(out).items()}
    for i, layer in enumerate(base.model.layers):
        mlps = [e.model.layers[i].mlp for e in experts]
        block = Brute(mlps, held[f"model.layers.{i}.mlp.gate.weight"], per_token)
        if shared:
            block.shared = [(layer.mlp, held[f"model.layers.{i}.mlp.shared_expert_gate.weight"] if gated else None)]
        layer.mlp = block
    return base


@pytest.mark.parametrize(("kind", "shared"), NATIVE)
@pytest.mark.parametrize("per_token", [1, 2])
def test_mixture_is_the_weighted_sum_of_the_models_mlps(kind, shared, per_token, models, tmp_path):
    build(spec_of(models[kind], shared, per_token), tmp_path / "out")
    expected = brute(models[kind], tmp_path / "out", per_token, shared)
    got = load(tmp_path / "out", dtype=torch.float64)
    # transformers takes the softmax in float32 even of a float64 model.
    torch.testing.assert_close(logits(got), logits(expected), rtol=0, atol=2e-5)
    assert (logits(got) - logits(load(models[kind][0], dtype=torch.float64))).abs().max() > 1


@pytest.mark.parametrize(("kind", "shared"), NATIVE)
def test_equal_gates_average_the_experts(kind, shared, models, tmp_path):
    build(spec_of(models[kind], shared, per_token=2), tmp_path / "out")
    mixture, averaged = load(tmp_path / "out", dtype=torch.float64), brute(models[kind], tmp_path / "out", 2, shared)
    with torch.no_grad():
        for ours, theirs in zip(mixture.model.layers, averaged.model.layers, strict=True):
            ours.mlp.gate.weight.zero_()
            mlps, extra = theirs.mlp.mlps, theirs.mlp.shared
            theirs.mlp = Mean(mlps, extra)
    torch.testing.assert_close(logits(mixture), logits(averaged), rtol=0, atol=2e-5)


class Mean(nn.Module):
    def __init__(self, mlps: list[nn.Module], shared: list[tuple[nn.Module, torch.Tensor]]) -> None:
        super().__init__()
        self.mlps, self.shared = mlps, shared

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mean = torch.stack([mlp(x) for mlp in self.mlps]).mean(0)
        return mean + sum((x @ gate.T).sigmoid() * mlp(x) for mlp, gate in self.shared)


class DeepseekBlock(nn.Module):
    """The mixture of DeepSeek-MoE as its paper defines it, with the modules that its released weights name."""

    def __init__(self, config: LlamaConfig, num_experts: int, per_token: int) -> None:
        from transformers.models.llama.modeling_llama import LlamaMLP

        super().__init__()
        self.gate = nn.Linear(config.hidden_size, num_experts, bias=False)
        self.experts = nn.ModuleList(LlamaMLP(config) for _ in range(num_experts))
        self.shared_experts = LlamaMLP(config)
        self.per_token = per_token

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        brute = Brute(list(self.experts), self.gate.weight, self.per_token)
        return brute(x) + self.shared_experts(x)


def load_deepseek(folder: Path, num_experts: int, per_token: int) -> LlamaForCausalLM:
    written = config(folder)
    settings = {k: v for k, v in written.items() if k in SIZES or k in ("rms_norm_eps", "rope_parameters", "head_dim")}
    model = LlamaForCausalLM(LlamaConfig(**settings)).double().eval()
    for layer in model.model.layers:
        layer.mlp = DeepseekBlock(model.config, num_experts, per_token).double()
    model.load_state_dict({name: value.double() for name, value in stored(folder).items()}, strict=True)
    return model


def test_deepseek_adds_the_shared_expert(models, tmp_path):
    spec = spec_of(models["llama"], per_token=2) | {"shared_experts": [expert(models["llama"][0])]}
    assert build(spec, tmp_path / "out").numbers["architecture"] == "DeepSeek-MoE"
    expected = brute(models["llama"], tmp_path / "out", 2, shared=True, gated=False)
    torch.testing.assert_close(logits(load_deepseek(tmp_path / "out", 2, 2)), logits(expected), rtol=0, atol=1e-9)
    written = config(tmp_path / "out")
    wanted = {
        "architectures": ["DeepseekForCausalLM"],
        "model_type": "deepseek",
        "n_routed_experts": 2,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
        "first_k_dense_replace": 0,
        "moe_layer_freq": 1,
        "scoring_func": "softmax",
        "moe_intermediate_size": 96,
    }
    assert wanted.items() <= written.items()
    assert written["auto_map"]["AutoConfig"].endswith("configuration_deepseek.DeepseekConfig")


def test_deepseek_of_identical_experts_is_the_dense_model(models, tmp_path):
    """With scales that sum to one; without a shared expert, as it is."""
    base = models["llama"][0]
    spec = {
        "base_model": str(base),
        "experts": [expert(base, text, residual_scale=0.75) for text in ("abc", "12")],
        "shared_experts": [expert(base, residual_scale=0.25)],
    }
    build(spec, tmp_path / "out")
    want = logits(load(base, dtype=torch.float64))
    torch.testing.assert_close(logits(load_deepseek(tmp_path / "out", 2, 2)), want, rtol=0, atol=1e-4)
    del spec["shared_experts"]
    build(spec | {"architecture": "deepseek"}, tmp_path / "alone")
    assert config(tmp_path / "alone")["n_shared_experts"] is None
    assert not any("shared" in name for name in stored(tmp_path / "alone"))


def test_experts_may_be_wider_than_the_base(models, tmp_path):
    wide = [tiny.save_model(dense("llama", i, intermediate_size=128), tmp_path / f"wide{i}") for i in range(2)]
    folders = [models["llama"][0], *wide]
    build(spec_of(folders), tmp_path / "out")
    assert config(tmp_path / "out")["intermediate_size"] == 128
    expected = brute(folders, tmp_path / "out", 1, shared=False)
    got = load(tmp_path / "out", dtype=torch.float64)
    torch.testing.assert_close(logits(got), logits(expected), rtol=0, atol=2e-5)


# Names and configs.


@pytest.mark.parametrize(("kind", "shared"), NATIVE)
def test_names_and_config_are_those_of_the_architecture(kind, shared, models, tmp_path):
    """transformers saves a mixture under the names of the released checkpoints."""
    build(spec_of(models[kind], shared, per_token=2), tmp_path / "out")
    model = load(tmp_path / "out")
    with quiet_transformers():
        model.save_pretrained(tmp_path / "again")
    ours, theirs = stored(tmp_path / "out"), stored(tmp_path / "again")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
    written = config(tmp_path / "out")
    assert written["architectures"] == [type(model).__name__]
    assert written["num_experts_per_tok"] == 2
    assert written["num_local_experts" if kind in ("llama", "mistral") and not shared else "num_experts"] == 2
    if "Qwen" in written["architectures"][0]:
        assert written["norm_topk_prob"] is True
        assert (written["decoder_sparse_step"], written["mlp_only_layers"]) == (1, [])
        assert written["moe_intermediate_size"] == 96
    assert written.get("shared_expert_intermediate_size") == (96 if shared else None)
    AutoTokenizer.from_pretrained(tmp_path / "out")
    assert "moe" in (tmp_path / "out" / "README.md").read_text()


def test_shards(models, tmp_path):
    build(spec_of(models["llama"]), tmp_path / "whole")
    build(spec_of(models["llama"]), tmp_path / "parts", shard_bytes=100_000)
    assert len(list((tmp_path / "parts").glob("*.safetensors"))) > 3
    ours, whole = stored(tmp_path / "parts"), stored(tmp_path / "whole")
    assert ours.keys() == whole.keys()
    assert all(torch.equal(ours[name], value) for name, value in whole.items())
    load(tmp_path / "parts")


# Routers.


def entered(folder: Path, text: str, mode: str) -> torch.Tensor:
    """Return what enters every layer, or every MLP, at each token of one prompt, by transformers alone: `[L, T, H]`."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer.encode(text, add_special_tokens=False)]])
    normed: list[torch.Tensor] = []
    for layer in model.model.layers:
        layer.post_attention_layernorm.register_forward_hook(lambda module, given, out: normed.append(out))
    with torch.no_grad():
        states = model(ids, output_hidden_states=True).hidden_states[:-1]
    return torch.cat(normed if mode.startswith("mlp") else states)


def direction(folder: Path, texts: list[str], mode: str) -> torch.Tensor:
    """Return the mean over prompts, `[L, H]`."""
    states = [entered(folder, text, mode) for text in texts]
    if mode == "cheap_embed":  # every token of every prompt counts alike
        mean = torch.cat([s[0] for s in states]).mean(0).expand(3, -1)
        return mean / mean.norm(dim=-1, keepdim=True)
    return torch.stack([s.mean(1) if mode.endswith("avg") else s[:, -1] for s in states]).mean(0)


MODES = ["hidden", "hidden_last", "hidden_avg", "mlp_input", "mlp_input_avg", "cheap_embed"]


@pytest.mark.parametrize("mode", MODES)
def test_routers_are_directions_of_hidden_states(mode, models, tmp_path):
    folders = models["llama"]
    build(spec_of(folders, gate_mode=mode), tmp_path / "out")
    first = direction(folders[0], LETTERS, mode)
    second = direction(folders[0], DIGITS, mode) - direction(folders[0], ["hello there", "no"], mode)
    expected = torch.nn.functional.normalize(torch.stack([first, second], 1), dim=-1)
    tensors = stored(tmp_path / "out")
    got = torch.stack([tensors[f"model.layers.{i}.block_sparse_moe.gate.weight"] for i in range(3)])
    torch.testing.assert_close(got, expected, rtol=0, atol=2e-6)
    assert mode == "cheap_embed" or (got[0] - got[1]).abs().max() > 0.1


def test_hidden_states_of_several_texts_are_those_of_each_alone(models):
    """Whatever their order and lengths; and the model is left without hooks."""
    model = load(models["llama"][0])
    rows = [[5] * 9, [1, 2], [7, 8, 9, 10], [3], [4, 5, 6, 7, 8, 9]]
    parts = [model.model.layers[2], model.model.layers[0].mlp]
    for pool in ("last", "mean"):
        together = module_inputs(model, parts, rows, pool=pool, batch_size=2)
        alone = torch.cat([module_inputs(model, parts, [row], pool=pool) for row in rows])
        torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)
    assert (together[0] - together[1]).abs().max() > 0.1
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_most_alike_gates_are_found():
    gates = np.random.default_rng(0).normal(size=(5, 4, 16)).astype(np.float32)
    gates[3, 2] = 0.5 * gates[3, 0] + 0.01 * gates[3, 1]
    pairs = {
        (layer, i, j): float(torch.nn.functional.cosine_similarity(*torch.tensor(gates[layer, [i, j]]), dim=0))
        for layer, i, j in product(range(5), range(4), range(4))
        if i != j
    }
    cosine, layer = alike(gates)
    assert (layer, cosine) == (3, pytest.approx(max(pairs.values()), abs=1e-6))


@pytest.mark.parametrize("more", [{}, *({"gate_mode": "random", "seed": seed} for seed in range(3))])
def test_report_tells_how_alike_routers_are(more, models, tmp_path):
    spec = spec_of(models["llama"], **more)
    spec["experts"][1] = expert(models["llama"][2], *LETTERS, LETTERS[1])
    result = build(spec, tmp_path / "out")
    tensors = stored(tmp_path / "out")
    gates = [tensors[f"model.layers.{i}.block_sparse_moe.gate.weight"] for i in range(3)]
    cosines = [float(torch.nn.functional.cosine_similarity(*gate, dim=0)) for gate in gates]
    assert result.numbers["gate_cosine"] == pytest.approx(max(cosines), abs=1e-6)
    assert result.numbers["gate_cosine_layer"] == int(np.argmax(cosines))
    assert (max(cosines) > 0.92) is ("too similar" in str(result.tables[0].rows)) is (not more)


def test_a_prompt_has_its_first_token_once(models, tmp_path):
    begin = AutoTokenizer.from_pretrained(models["llama"][0]).bos_token
    spec = spec_of(models["llama"])
    build(spec, tmp_path / "plain")
    for each in spec["experts"]:
        each["positive_prompts"] = [begin + text for text in each["positive_prompts"]]
    build(spec, tmp_path / "begun")
    plain, begun = stored(tmp_path / "plain"), stored(tmp_path / "begun")
    assert all(torch.equal(value, begun[name]) for name, value in plain.items())


@pytest.mark.parametrize("mode", ["hidden", "mlp_input", "cheap_embed"])
def test_tokens_go_to_the_expert_whose_prompts_are_like_them(mode, tmp_path):
    """Planted: embeddings of lower-case letters lie around one direction, those of digits around another."""
    model = dense("llama", seed=3)
    letters, digits = torch.arange(97, 123), torch.arange(48, 58)
    with torch.no_grad():
        table = model.model.embed_tokens.weight
        table.mul_(0.3)
        table[letters, 0], table[digits, 0] = 3.0, -3.0
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.mul_(0.02)
            layer.mlp.down_proj.weight.mul_(0.02)
            layer.post_attention_layernorm.weight.fill_(1.0)
    folders = [tiny.save_model(model, tmp_path / "base")]
    folders += [tiny.save_model(tiny.tuned(model, i), tmp_path / f"tuned{i}") for i in range(2)]
    spec = {
        "base_model": str(folders[0]),
        "experts": [expert(folders[1], "abcde", "fgh"), expert(folders[2], "0123", "45")],
        "experts_per_token": 1,
        "gate_mode": mode,
    }
    build(spec, tmp_path / "out")
    mixture = load(tmp_path / "out")
    with torch.no_grad():
        routed = mixture(torch.cat([letters[10:], digits[6:]])[None], output_router_logits=True).router_logits
    wanted = torch.tensor([0] * 16 + [1] * 4)
    assert all(torch.equal(layer.argmax(-1), wanted) for layer in routed)


def test_random_routers(models, tmp_path):
    """No prompts are needed; numbers follow their law and depend on the seed alone."""
    gates = {}
    for mode, seed in (("random", 0), ("random", 1), ("uniform_random", 0)):
        spec = {"base_model": str(models["llama"][0]), "gate_mode": mode, "seed": seed}
        spec["experts"] = [expert(folder) for folder in models["llama"]]
        for name in ("a", "b"):
            build(spec, tmp_path / f"{mode}{seed}{name}")
        first, again = (stored(tmp_path / f"{mode}{seed}{name}") for name in ("a", "b"))
        assert all(torch.equal(value, again[key]) for key, value in first.items())
        gates[mode, seed] = torch.cat([first[f"model.layers.{i}.block_sparse_moe.gate.weight"] for i in range(3)])
    assert kstest(gates["random", 0].flatten(), "norm").pvalue > 0.01
    bound = 48**-0.5
    assert kstest(gates["uniform_random", 0].flatten() / bound, "uniform", (-1, 2)).pvalue > 0.01
    assert abs(np.corrcoef(gates["random", 0].flatten(), gates["random", 1].flatten())[0, 1]) < 0.15
    assert abs(np.corrcoef(gates["random", 0][:3].flatten(), gates["random", 0][3:6].flatten())[0, 1]) < 0.25


# Weights of the experts.


def test_noise_and_residual_scale(models, tmp_path):
    base = models["llama"][0]
    plain = {"base_model": str(base), "gate_mode": "random", "dtype": "float32"}
    noisy = expert(base, noise_scale=0.5, residual_scale=0.25)
    build(plain | {"experts": [noisy, expert(base, noise_scale=0.5), expert(base)]}, tmp_path / "out")
    source, got = stored(base), stored(tmp_path / "out")
    noise: list[list[torch.Tensor]] = [[], [], []]
    for layer in range(3):
        for dense_name, name in (("gate_proj", "w1"), ("up_proj", "w3"), ("down_proj", "w2")):
            weight = source[f"model.layers.{layer}.mlp.{dense_name}.weight"]
            for index in range(3):
                value = got[f"model.layers.{layer}.block_sparse_moe.experts.{index}.{name}.weight"]
                scale = 0.25 if index == 0 and name == "w2" else 1.0
                noise[index].append((value / scale - weight).flatten())
    assert torch.cat(noise[2]).abs().max() == 0
    for index in (0, 1):
        assert kstest(torch.cat(noise[index]) / 0.5, "norm").pvalue > 0.01
    assert abs(np.corrcoef(torch.cat(noise[0]), torch.cat(noise[1]))[0, 1]) < 0.02


def test_normals_do_not_depend_on_the_slices():
    draws = Draws(3, "name", 1)
    whole = normals(draws, 0, 200_000)
    assert np.array_equal(np.concatenate([normals(draws, 0, 70_001), normals(draws, 70_001, 200_000)]), whole)
    assert kstest(whole, "norm").pvalue > 0.01


@pytest.mark.parametrize(("dtype", "wanted"), [("float16", torch.float16), ("bfloat16", torch.bfloat16)])
def test_results_are_rounded_once(dtype, wanted, models, tmp_path):
    folders = models["llama"]
    spec = spec_of(folders, dtype=dtype)
    spec["experts"][1]["residual_scale"] = 0.3
    build(spec, tmp_path / "out")
    got, base, tuned = stored(tmp_path / "out"), stored(folders[0]), stored(folders[2])
    assert {value.dtype for value in got.values()} == {wanted}
    assert config(tmp_path / "out")["torch_dtype"] == dtype
    name = "model.layers.1.self_attn.q_proj.weight"
    assert torch.equal(got[name], base[name].to(wanted))
    down = tuned["model.layers.1.mlp.down_proj.weight"]
    assert torch.equal(got["model.layers.1.block_sparse_moe.experts.1.w2.weight"], (down * 0.3).to(wanted))
    build(spec | {"dtype": "float32"}, tmp_path / "exact")
    router = "model.layers.1.block_sparse_moe.gate.weight"
    assert torch.equal(got[router], stored(tmp_path / "exact")[router].to(wanted))
    assert load(tmp_path / "out").dtype == wanted


def test_without_a_dtype_tensors_keep_the_base_s(models, tmp_path):
    half = tiny.save_model(dense("llama").to(torch.bfloat16), tmp_path / "half")
    build(spec_of([half, *models["llama"][1:]]), tmp_path / "out")
    assert {value.dtype for value in stored(tmp_path / "out").values()} == {torch.bfloat16}


def test_overflow_is_reported(models, tmp_path):
    spec = spec_of(models["llama"], dtype="float16")
    spec["experts"][0]["residual_scale"] = 1e6
    result = build(spec, tmp_path / "out")
    assert result.non_finite == [f"model.layers.{i}.block_sparse_moe.experts.0.w2.weight" for i in range(3)]


# Adapters and models in memory.


@pytest.mark.parametrize("kind", ["plain", "dora", "few"])
@pytest.mark.parametrize("named", [False, True])
def test_adapters_are_experts(kind, named, base, loras, tmp_path):
    source = f"{base}+{loras[kind]}" if named else str(loras[kind])
    spec = {"base_model": str(base), "experts": [expert(source), expert(base)], "gate_mode": "random"}
    result = build(spec, tmp_path / "out")
    merged, got = tiny.load_merged(base, loras[kind]).state_dict(), stored(tmp_path / "out")
    for layer in range(3):
        for dense_name, name in (("gate_proj", "w1"), ("up_proj", "w3"), ("down_proj", "w2")):
            ours = got[f"model.layers.{layer}.block_sparse_moe.experts.0.{name}.weight"]
            torch.testing.assert_close(
                ours, merged[f"model.layers.{layer}.mlp.{dense_name}.weight"], rtol=1e-5, atol=1e-5
            )
    lost, touched = {"few": (3, 6)}.get(kind, (12, 21))
    assert (
        f"experts[0]: {lost} of {touched} tensors that its adapter changes are not of MLPs, and are left out"
        in (result.numbers["notes"])
    )


@pytest.mark.parametrize("mode", ["hidden", "cheap_embed"])
def test_an_adapted_base_reads_the_prompts(mode, base, tmp_path):
    """Its attention is in the output, and its hidden states make the routers."""
    lora = tiny.save_lora(base, tmp_path / "lora", target_modules=["q_proj", "v_proj", "embed_tokens"])
    merged = tiny.save_model(tiny.load_merged(base, lora), tmp_path / "merged")
    for name, source in (("ours", f"{base}+{lora}"), ("theirs", str(merged))):
        experts = [expert(base, *LETTERS), expert(base, *DIGITS)]
        build({"base_model": source, "experts": experts, "gate_mode": mode}, tmp_path / f"{name}.out")
    ours, theirs = stored(tmp_path / "ours.out"), stored(tmp_path / "theirs.out")
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], rtol=1e-5, atol=1e-5)
    assert (
        ours["model.layers.0.self_attn.q_proj.weight"] - stored(base)["model.layers.0.self_attn.q_proj.weight"]
    ).any()


def test_compressed_deltas_and_merges_are_experts(models, tmp_path):
    """Their MLPs are those of the folders that extracting and merging them would have written."""
    base, first, second = models["llama"][:3]
    extract(base, {"one": first, "two": second}, tmp_path / "deltas", kind="bit", quiet=True)
    inner = {
        "merge_method": "task_arithmetic",
        "base_model": str(base),
        "models": [{"model": str(first)}, {"model": f"{tmp_path / 'deltas'}#two", "parameters": {"weight": 0.5}}],
        "parameters": {"weight": 0.3},
    }
    merge(inner, tmp_path / "merged", quiet=True)
    deltas = [{"model": f"{tmp_path / 'deltas'}#two"}]
    expanded = {"merge_method": "task_arithmetic", "base_model": str(base), "models": deltas}
    merge(expanded, tmp_path / "expanded", quiet=True)
    whole = build(spec_of([base, tmp_path / "merged", tmp_path / "expanded"]), tmp_path / "whole")
    spec = spec_of([base, first, second])
    spec["experts"][0]["source_model"], spec["experts"][1]["source_model"] = inner, f"{tmp_path / 'deltas'}#two"
    result = build(spec, tmp_path / "out")
    assert not result.non_finite
    got, wanted = stored(result.path), stored(whole.path)
    assert got.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(got[name], value, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("mode", ["mlp_input", "cheap_embed"])
def test_a_merge_is_the_base(mode, models, tmp_path):
    """Its layers are more than its donor's, and both its weights and its states are those of the folder."""
    base, first = models["llama"][:2]
    stacked = {}
    for name, model in (("base", base), ("other", first)):
        layers = {"sources": [{"model": str(model), "layer_range": [0, 2]}]}
        stacked[name] = {"merge_method": "passthrough", "slices": [layers, layers]}
        merge(stacked[name], tmp_path / name, quiet=True)
    inner, experts = stacked["base"], [expert(tmp_path / "base", *LETTERS), expert(tmp_path / "other", *DIGITS)]
    for name, source in (("ours", inner), ("theirs", str(tmp_path / "base"))):
        build({"base_model": source, "experts": experts, "gate_mode": mode}, tmp_path / f"{name}.out")
    ours, theirs = stored(tmp_path / "ours.out"), stored(tmp_path / "theirs.out")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


def test_what_is_wrong_with_an_expert_that_is_a_merge_is_told_at_its_place(models):
    spec = spec_of(models["llama"])
    spec["experts"][1]["source_model"] = {"merge_method": "tise", "models": [{"model": models["llama"][1]}]}
    with pytest.raises(SpecError, match=r"experts\[1\]\.source_model\.merge_method: .*did you mean 'ties'"):
        make_plan(spec)


def test_what_is_copied_is_looked_through_too(models, tmp_path):
    broken = dense("llama")
    with torch.no_grad():
        broken.model.norm.weight[3] = torch.nan
    folder = tiny.save_model(broken, tmp_path / "broken")
    assert build(spec_of([folder, *models["llama"][1:]]), tmp_path / "out").non_finite == ["model.norm.weight"]


def test_models_in_memory_are_experts(models, tmp_path):
    folders = models["llama"]
    in_memory = load(folders[1])
    spec = spec_of(folders)
    build(spec, tmp_path / "files")
    spec["experts"][0]["source_model"] = in_memory
    build(spec, tmp_path / "memory")
    ours, theirs = stored(tmp_path / "memory"), stored(tmp_path / "files")
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
    spec["base_model"] = in_memory
    with pytest.raises(SpecError, match="in memory brings no tokenizer"):
        build(spec, tmp_path / "none")
    build(spec | {"gate_mode": "random"}, tmp_path / "random")


# mergekit-moe runs the same specs.


@pytest.fixture
def mergekit_moe(monkeypatch):
    """Return mergekit-moe as a function; it computes hidden states in bfloat16, here in float32."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from mergekit.moe import router
        from mergekit.moe.config import MoEMergeConfig
        from mergekit.options import MergeOptions
        from mergekit.scripts import moe

    read = AutoModelForCausalLM.from_pretrained

    class Exact:
        @staticmethod
        def from_pretrained(*args: Any, torch_dtype: Any = None, **options: Any) -> PreTrainedModel:
            return read(*args, dtype=torch.float32, **options)

    monkeypatch.setattr(router, "AutoModelForCausalLM", Exact)

    def run(spec: Mapping[str, Any], out: Path) -> dict[str, torch.Tensor]:
        with quiet_transformers(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            moe.build(MoEMergeConfig.model_validate(spec), str(out), MergeOptions(), device="cpu", allow_all_same=True)
        return stored(out)

    return run


def fused(tensors: Mapping[str, torch.Tensor], names: tuple[str, str, str]) -> dict[str, torch.Tensor]:
    """Stack experts as transformers 5 has them in memory, which is what mergekit writes for two architectures."""
    gate, up, down = names
    found = {
        name.replace("block_sparse_moe", "mlp"): value for name, value in tensors.items() if ".experts." not in name
    }
    flat = {name.replace("block_sparse_moe", "mlp"): value for name, value in tensors.items()}
    for layer in range(3):
        place = f"model.layers.{layer}.mlp.experts"
        ups = [torch.cat([flat[f"{place}.{i}.{gate}.weight"], flat[f"{place}.{i}.{up}.weight"]]) for i in range(2)]
        found[f"{place}.gate_up_proj"] = torch.stack(ups)
        found[f"{place}.down_proj"] = torch.stack([flat[f"{place}.{i}.{down}.weight"] for i in range(2)])
    return found


@pytest.mark.parametrize(
    ("kind", "shared", "mode", "more"),
    [
        ("llama", None, "hidden", {}),
        ("mistral", None, "cheap_embed", {}),
        ("llama", None, "hidden", {"architecture": "deepseek"}),
        ("mistral", [], "hidden_last", {}),
        ("llama", ["anything"], "hidden", {}),
        ("qwen2", ["anything"], "hidden", {"dtype": "bfloat16"}),
        ("qwen3", None, "hidden", {"architecture": "qwen"}),
    ],
)
def test_mergekit_writes_the_same_mixture(kind, shared, mode, more, models, mergekit_moe, tmp_path):
    folders = models[kind]
    spec = spec_of(folders, gate_mode=mode, **({"dtype": "float32"} | more))
    if shared is not None:
        spec["shared_experts"] = [expert(folders[0], *shared, residual_scale=0.1)]
    result = build(spec, tmp_path / "ours")
    theirs, ours = mergekit_moe(spec, tmp_path / "theirs"), stored(tmp_path / "ours")
    if result.numbers["architecture"] == "Mixtral":
        ours = fused(ours, ("w1", "w3", "w2"))
    elif result.numbers["architecture"] == "Qwen3-MoE":
        ours = fused(ours, ("gate_proj", "up_proj", "down_proj"))
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        if "gate.weight" in name:
            tolerance = 1e-2 if value.dtype == torch.bfloat16 else 5e-6
            torch.testing.assert_close(value, theirs[name], rtol=0, atol=tolerance)
        else:
            assert torch.equal(value, theirs[name]), name
    written, other = config(tmp_path / "ours"), config(tmp_path / "theirs")
    # Its defaults are those of the classes; it names the folder of the base, and turns a sliding window off.
    keys = {
        "num_local_experts",
        "num_experts",
        "num_experts_per_tok",
        "n_routed_experts",
        "n_shared_experts",
        "hidden_size",
    }
    keys |= {"moe_intermediate_size", "shared_expert_intermediate_size", "norm_topk_prob", "decoder_sparse_step"}
    keys |= {"model_type", "architectures", "rms_norm_eps", "rope_parameters", "num_key_value_heads", "auto_map"}
    both = keys & written.keys() & other.keys()
    assert {key: written[key] for key in both} == {key: other[key] for key in both}
    assert len(both) >= 6


@pytest.mark.parametrize("kind", list(CLASSES))
@pytest.mark.parametrize("mode", ["hidden", "random"])
def test_mergekit_chooses_the_same_architecture(kind, mode, models):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from mergekit.moe.config import MoEMergeConfig
        from mergekit.options import MergeOptions
        from mergekit.scripts.moe import select_output_arch

    def theirs(spec: dict[str, Any]) -> str | None:
        try:
            name = select_output_arch(MoEMergeConfig.model_validate(spec), MergeOptions()).name()
        except SystemExit:
            return None
        return {"DeepSeek MoE": "DeepSeek-MoE", "Qwen MoE": "Qwen2-MoE", "Qwen3 MoE": "Qwen3-MoE"}.get(name, name)

    def ours(spec: dict[str, Any]) -> str | None:
        try:
            plan = make_plan(spec)
        except SpecError:
            return None
        plan.models.close()
        return plan.architecture.name

    chosen = set()
    for shared, wanted in product([None, [], ["anything"]], [None, "mixtral", "deep", "qwen", "Qwen3 MoE"]):
        spec = spec_of(models[kind], gate_mode=mode) | ({"architecture": wanted} if wanted else {})
        if shared is not None:
            spec["shared_experts"] = [expert(models[kind][0], *shared)]
        assert ours(spec) == theirs(spec), (shared, wanted)
        chosen.add(ours(spec))
    assert len(chosen) == {"llama": 4, "mistral": 4, "qwen2": 2, "qwen3": 2}[kind]


# What is refused.


def faults(spec: Mapping[str, Any]) -> list[str]:
    with pytest.raises(SpecError) as caught:
        make_plan(spec)
    return [str(problem) for problem in caught.value.problems]


def test_all_problems_at_once_before_weights_are_read(models, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "toolkit.checkpoints.reader.FolderCheckpoint.read_raw", lambda *_: pytest.fail("weights are read")
    )
    narrow = tiny.save_model(dense("llama", intermediate_size=64), tmp_path / "narrow")
    other = tiny.save_model(dense("llama", hidden_size=64, num_attention_heads=4), tmp_path / "other")
    spec = {
        "base_model": str(models["llama"][0]),
        "dtype": "int8",
        "experts_per_token": 7,
        "experts": [
            expert(models["llama"][1], "abc", ""),
            expert(narrow),
            expert(other, "x" * 300),
            expert("no/where/at-all", "y"),
            expert(models["qwen2"][1], "z"),
        ],
    }
    found = faults(spec)
    assert [line.partition(": ")[0] for line in found] == [
        "experts_per_token",
        "experts[1].positive_prompts",
        "dtype",
        "experts[3].source_model",
        "experts[1].source_model",
        "experts[2].source_model",
        "experts[4].source_model",
        "experts[2].positive_prompts[0]",
    ]
    assert "is 7, but there are 5 experts" in found[0]
    assert "shape [64, 48], but [96, 48] in experts[0], and 8 more such tensors" in found[4]
    assert "shape [96, 64], but [96, 48] in experts[0], and 8 more" in found[5]
    assert "is of type qwen2, not llama or mistral" in found[6]
    assert "has 301 tokens, but the base has room for 256" in found[7]
    with pytest.raises(SpecError):
        build(spec, tmp_path / "out")
    assert not list(tmp_path.glob("*out*"))


def changed(folder: Path, out: Path, **changes: Any) -> Path:
    """Copy a model with another config."""
    model = load(folder)
    tiny.save_model(model, out)
    (out / "config.json").write_text(json.dumps(config(out) | changes))
    return out


def test_vocabularies_must_agree(models, tmp_path):
    """Further tokens do no harm, others do."""
    base = models["llama"][0]
    longer = tiny.save_model(dense("llama", 1, vocab_size=300), tmp_path / "longer")
    spec = {"base_model": str(base), "gate_mode": "random", "experts": [expert(longer), expert(base)]}
    make_plan(spec).models.close()
    tokenizer = json.loads((longer / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    turned = dict(zip(vocabulary, reversed(list(vocabulary.values())), strict=True))
    tokenizer["model"]["vocab"] = turned
    (longer / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert "its vocabulary is another" in faults(spec)[0]
    assert faults(spec)[0].startswith("experts[0].source_model: ")
    (longer / "tokenizer.json").unlink()
    assert "has 300 tokens, but the base 262, and no tokenizer.json says which are the same" in faults(spec)[0]


def test_models_that_do_not_fit(models, base, loras, tmp_path):
    llama = models["llama"]
    deeper = tiny.save_model(dense("llama", num_hidden_layers=4), tmp_path / "deeper")
    shallow = tiny.save_model(dense("llama", num_hidden_layers=2), tmp_path / "shallow")
    gelu = changed(llama[1], tmp_path / "gelu", hidden_act="gelu")
    attention = tiny.save_lora(base, tmp_path / "attention", target_modules=["q_proj"])
    wide = tiny.save_model(dense("llama", hidden_size=64), tmp_path / "wide")
    plain = {"base_model": str(base), "gate_mode": "random"}
    found = faults(plain | {"experts": [expert(wide), expert(wide)]})
    wanted = "model.layers.0.mlp.gate_proj.weight: shape [96, 64], but the base has a hidden size of 48"
    assert found == [f"experts[{i}].source_model: {wanted}, and 8 more such tensors" for i in range(2)]
    found = faults(plain | {"experts": [expert(x) for x in (base, deeper, shallow, gelu, attention)]})
    assert found == [
        "experts[1].source_model: has more layers than the 3 of the base",
        "experts[2].source_model: lacks model.layers.2.mlp.gate_proj.weight, and 2 more such tensors",
        "experts[3].source_model: its activation is gelu, but silu in the base",
        "experts[4].source_model: the adapter changes no MLP, so the expert would be its base",
    ]


def test_bases_that_do_not_fit(models, tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    sizes = {"n_embd": 48, "n_layer": 2, "n_head": 2, "vocab_size": tiny.VOCAB_SIZE, "n_positions": 32}
    gpt2 = tiny.save_model(GPT2LMHeadModel(GPT2Config(**sizes)), tmp_path / "gpt2")
    biased = tiny.save_model(dense("llama", mlp_bias=True, attention_bias=True), tmp_path / "biased")
    quantized = changed(models["llama"][0], tmp_path / "quantized", quantization_config={"quant_method": "gptq"})
    longer = changed(models["llama"][0], tmp_path / "counted", num_hidden_layers=9)

    def fault(base: Path) -> str:
        return faults({"base_model": str(base), "gate_mode": "random", "experts": [expert(base), expert(base)]})[0]

    types = "Mixtral or DeepSeek-MoE or Qwen2-MoE or Qwen3-MoE can be built from llama, mistral, qwen2, qwen3"
    assert fault(gpt2) == f"base_model: is of type gpt2; {types}"
    assert "base_model: Mixtral has no place for model.layers.0.mlp.down_proj.bias (21 such tensors)" in fault(biased)
    assert "is quantized" in fault(quantized)
    assert fault(longer) == "base_model: its config says 9 layers, its weights 3"
    assert fault(tmp_path / "nowhere").startswith("base_model: ")


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({"shared_experts": [{"source_model": "."}] * 2}, "shared_experts: Mixtral takes no shared experts, got 2"),
        ({"architecture": "qwen"}, "Qwen2-MoE takes one shared expert, got 0; one with residual_scale 0 has no effect"),
        ({"architecture": "switch"}, "architecture: no architecture is called 'switch' (known: Mixtral, DeepSeek-MoE"),
        ({"architecture": "qwen3"}, "base_model: is of type llama; Qwen3-MoE can be built from qwen3"),
        ({"gate_mode": "hiden"}, "gate_mode: "),
        ({"experts": []}, "experts: "),
        ({"experts_per_token": 0}, "experts_per_token: "),
        ({"experts_per_tokn": 1}, "unknown key 'experts_per_tokn'; did you mean 'experts_per_token'?"),
    ],
)
def test_wrong_specs(changes, wanted, models):
    found = faults(spec_of(models["llama"]) | changes)
    assert any(wanted in line for line in found), found


def test_prompts_that_cannot_tell_experts_apart(models):
    spec = spec_of(models["llama"])
    spec["experts"] = [expert(folder, "same", negative_prompts=["no"]) for folder in models["llama"]]
    assert faults(spec) == ["experts: all have the same prompts, so that no router could tell them apart"]
    make_plan(spec | {"gate_mode": "random"}).models.close()


def test_shared_experts_and_prompts(models):
    llama = models["llama"]
    prompted = spec_of(llama, shared=True, architecture="deepseek")
    assert "has no gate for a shared expert, so it takes no prompts" in faults(prompted)[0]
    plain = spec_of(llama, architecture="qwen") | {"shared_experts": [expert(llama[0])]}
    assert faults(plain)[0].startswith("shared_experts[0].positive_prompts: required by gate_mode hidden")


def test_sliding_windows_that_cannot_be_kept_are_told(tmp_path):
    mistral = tiny.save_model(dense("mistral", sliding_window=8), tmp_path / "mistral")
    spec = {"base_model": str(mistral), "gate_mode": "random", "experts": [expert(mistral), expert(mistral)]}
    plan = make_plan(spec | {"architecture": "deepseek"})
    plan.models.close()
    assert any("no window of 8 tokens" in note for note in plan.notes)
    assert plan.config["sliding_window"] is None
    with make_plan(spec).models.base as base:
        assert base.config["sliding_window"] == 8


# The command and the report.


def test_command(models, tmp_path, capsys):
    path = tmp_path / "moe.yaml"
    path.write_text(yaml.safe_dump(spec_of(models["llama"], dtype="bfloat16")))
    assert main(["moe", str(path), "--dry-run"]) == 0
    assert "Mixtral" in capsys.readouterr().out
    assert main(["moe", str(path), str(tmp_path / "out"), "--quiet", "--json", "--device", "cpu"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["experts"] == [str(folder) for folder in models["llama"][1:]]
    sizes = {name: value.numel() for name, value in stored(tmp_path / "out").items()}
    assert told["parameters"] == sum(sizes.values())
    assert told["active_parameters"] == sum(n for name, n in sizes.items() if ".experts.1." not in name)
    assert told["write_bytes"] == 2 * told["parameters"]
    load(tmp_path / "out")
    assert main(["moe", str(path), str(tmp_path / "out"), "--quiet"]) == 1
    assert main(["moe", str(path), "--set", "experts_per_token=3"]) == 2
    assert "name the folder to write" in capsys.readouterr().err
    assert main(["moe", str(path), str(tmp_path / "two"), "--set", "experts_per_token=3"]) == 2
    assert "experts_per_token: is 3, but there are 2 experts" in capsys.readouterr().err
    assert main(["moe", str(path), "--dry-run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["gate_mode"] == "hidden"


def test_active_parameters_are_those_that_one_token_meets(models, tmp_path):
    folder = models["qwen3"][0]
    experts = [expert(models["qwen3"][i % 3]) for i in range(5)]
    spec = {"base_model": str(folder), "gate_mode": "random", "experts": experts, "experts_per_token": 2}
    told = build(spec, tmp_path / "out").numbers
    sizes = {name: value.numel() for name, value in stored(tmp_path / "out").items()}
    asleep = [size for name, size in sizes.items() if any(f".experts.{i}." in name for i in (2, 3, 4))]
    assert told["active_parameters"] == sum(sizes.values()) - sum(asleep)


def test_card_names_the_files_by_their_hashes(models, tmp_path):
    out = build(spec_of(models["llama"]), tmp_path / "out").path
    card = (out / "README.md").read_text()
    for folder in models["llama"]:
        file = folder / "model.safetensors"
        assert f"| {file} | " in card
        assert sampled_hash(file) in card


def test_output_is_whole_or_absent(models, tmp_path, monkeypatch):
    spec = spec_of(models["llama"])
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("kept")
    with pytest.raises(OutputError, match="exists already"):
        build(spec, tmp_path / "full")
    monkeypatch.setattr("toolkit.merge.moe.build.write_card", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        build(spec, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["full"]


def test_the_embedded_base(tmp_path):
    spec = {
        "base_model": "toolkit:base",
        "experts": [expert("toolkit:base", "write it in capitals"), expert("toolkit:base", "sort the letters")],
    }
    build(spec, tmp_path / "out")
    ours = load(tmp_path / "out", dtype=torch.float32)
    torch.testing.assert_close(logits(ours), logits(load_model("toolkit:base").model), rtol=0, atol=1e-4)
