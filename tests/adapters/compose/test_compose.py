"""Compositions of adapters of every kind against those adapters alone, as PEFT computes them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import PeftModel

from tests import tiny
from tests.adapters.laws import IDS, attach, bits, close, config_of, gpt2, logits, randomise, same_bits, save
from tests.adapters.methods.test_scalearn import saved_source
from tests.adapters.test_laws import NAMES, example
from tests.adapters.test_methods import FIELDS
from tests.adapters.test_methods import METHODS as PEFT_METHODS
from toolkit.adapters import catalogue
from toolkit.adapters.compose import compose, replicate
from toolkit.adapters.compose.layer import ComposedLayer
from toolkit.adapters.compose.mix import Once
from toolkit.adapters.compose.sources import config_of as source_config
from toolkit.adapters.compose.tree import Average, Leaf, Stack, data, parse
from toolkit.errors import CheckpointError, MissingError, SpecError, UnsupportedError

pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{message}")
    for message in (
        "Failed to load the CUDA extension",
        "Setting boft_n_butterfly_factor to 1",
        "Detected that the base layer has no bias term",
        "Unsupported layer type",
        "Sparse invariant checks are implicitly disabled",
        "adapter_config.json",
    )
]

COMPOSED = {"scalearn", "adapter_fusion", "composition"}
DECODERS = {"lst", "unipt", "sherl", "parscale"}
NO_LAYERS = {"poly", "xlora", "shadow", "adaption_prompt", "trainable_tokens"}
NOT_HERE = {"beft", "lora", *NO_LAYERS}
"""BEFT has no bias to train on this model; LoRA is tested on its own."""


def kinds() -> list[str]:
    layered = [name for name in PEFT_METHODS if (m := catalogue.find(name)) and not m.virtual_tokens]
    return sorted({*layered, *NAMES} - COMPOSED - DECODERS - NOT_HERE)


def fields_of(method: str) -> dict[str, Any]:
    if method in NAMES:
        return dict(example(method).config)
    found = catalogue.find(method)
    assert found
    return found.defaults() | FIELDS.get(method, {}) | ({"total_step": 10} if method == "adalora" else {})


def source(folder: Path, method: str, seed: int = 2, strength: float = 0.1, **fields: Any) -> tuple[str, torch.Tensor]:
    """Save a random adapter; return its folder, and the logits of what stock PEFT reads there."""
    model = attach(tiny.llama(), method, **(fields or fields_of(method)))
    if method not in ("osf", "psoft"):
        randomise(model, seed, strength)
    return str(save(model, folder)), logits(PeftModel.from_pretrained(tiny.llama(), folder))


QUICK = {*NAMES, "adalora", "c3a", "ia3", "ln_tuning", "loha", "oft", "vera", "vblora"}
"""Kinds that differ most in what their layers do; the others take as long as all the rest of this file."""


@pytest.mark.parametrize("method", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in kinds()])
def test_adapters_of_every_kind(method, tmp_path):
    """Alone it is itself; with weight w beside another, what each module adds is w times what it adds alone."""
    folder, expected = source(tmp_path / "a", method)
    one = attach(tiny.llama(), "composition", sources={"a": folder}, compose="a")
    assert torch.equal(logits(one), expected)
    saved = save(one, tmp_path / "composed")
    assert torch.equal(logits(PeftModel.from_pretrained(tiny.llama(), saved)), expected)
    assert same_bits(bits(one.unload()), bits(tiny.llama()))
    if method == "mix_and_match":  # its prefixes can be stacked alone
        return
    other, beside = source(tmp_path / "b", "hydra_lora")
    both = attach(tiny.llama(), "composition", sources={"a": folder, "b": other})
    for weights, wanted in (((1.0, 0.0), expected), ((0.0, 1.0), beside), ((0.0, 0.0), logits(tiny.llama()))):
        for layer in both.modules():
            if isinstance(layer, ComposedLayer):
                layer.built["default"].rule.numbers = weights
        close(logits(both), wanted, 1e-5)


@pytest.fixture
def sources(tmp_path):
    """Four random adapters of four kinds, as folders."""
    made = {
        "lora": saved_source(tmp_path / "lora", "lora", 1, r=2, target_modules="all-linear"),
        "ia3": saved_source(
            tmp_path / "ia3", "ia3", 2, target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]
        ),
        "bottleneck": saved_source(tmp_path / "bottleneck", "bottleneck", 3, size=4, variant="houlsby"),
        "hydra": saved_source(tmp_path / "hydra", "hydra_lora", 4, target_modules=["q_proj", "down_proj"]),
    }
    return {name: folder for name, (folder, _) in made.items()}


def modules(model: torch.nn.Module) -> dict[str, ComposedLayer]:
    return {name: m for name, m in model.named_modules() if isinstance(m, ComposedLayer)}


def composed(sources: dict[str, str], tree: Any) -> PeftModel:
    return attach(tiny.llama(), "composition", sources=sources, compose=tree)


def layer_at(model: torch.nn.Module, end: str) -> ComposedLayer:
    return next(layer for name, layer in modules(model).items() if name.endswith(end))


@torch.no_grad()
def change_alone(sources: dict[str, str], name: str, end: str, x: torch.Tensor) -> torch.Tensor:
    layer = layer_at(composed(sources, name), end)
    return layer(x) - layer.base_layer(x)


@torch.no_grad()
def test_average_is_the_weighted_sum_of_changes(sources):
    x = torch.randn(2, 5, 96)
    model = composed(sources, {"average": ["lora", "ia3", "hydra"], "weights": [0.5, -1.0, 2.0]})
    layer = layer_at(model, "layers.1.mlp.down_proj")
    parts = [change_alone(sources, name, "layers.1.mlp.down_proj", x) for name in ("lora", "ia3", "hydra")]
    close(layer(x), layer.base_layer(x) + 0.5 * parts[0] - parts[1] + 2 * parts[2])


@torch.no_grad()
def test_stack_hands_each_what_the_one_before_made(sources):
    """Hydra's sequential branch on top of a LoRA reads the LoRA's output: `y + B_p A_p x + B_s A_s y`."""
    x = torch.randn(2, 5, 96)
    model = composed(sources, {"stack": ["lora", "hydra"]})
    layer = layer_at(model, "layers.1.mlp.down_proj")
    y = layer.base_layer(x) + change_alone(sources, "lora", "layers.1.mlp.down_proj", x)
    hydra = layer.composition_sources["default"].of_hydra
    pa, pb, sa, sb = (hydra.tensor("hydra", f"{b}_{f}") for b in ("parallel", "sequential") for f in "ab")
    close(layer(x), y + x @ pa.T @ pb.T + y @ sa.T @ sb.T)
    other = layer_at(composed(sources, {"stack": ["hydra", "lora"]}), "layers.1.mlp.down_proj")
    assert (other(x) - layer(x)).abs().max() > 1e-3, "the order matters"


def test_stack_of_loras_is_their_sum_and_nesting_is_what_it_says(sources, tmp_path):
    more = sources | {"second": saved_source(tmp_path / "second", "lora", 9, r=3, target_modules=["q_proj"])[0]}
    stacked = composed(more, {"stack": ["lora", "second"]})
    summed = composed(more, {"average": ["lora", "second"], "weights": [1, 1]})
    close(logits(stacked), logits(summed))
    nested = composed(more, {"average": [{"stack": ["lora", "second"]}, "bottleneck"], "weights": [1, 0]})
    close(logits(nested), logits(stacked))
    over = composed(more, {"stack": [{"average": ["lora", "second"], "weights": [1, 1]}, "hydra"]})
    close(logits(over), logits(composed(more, {"stack": ["lora", "second", "hydra"]})))


def test_parallel_is_each_adapter_alone_on_its_rows(sources):
    names = list(sources)
    model = composed(sources, {"parallel": names})
    batch = replicate({"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}, len(names))
    with torch.no_grad():
        outputs = model(**batch).logits.reshape(len(names), *IDS.shape, -1)
    for name, got in zip(names, outputs, strict=True):
        close(got, logits(composed(sources, name)), 1e-5)
    with pytest.raises(ValueError, match="2 rows cannot be shared out among 4 parallel"):
        logits(model)


@torch.no_grad()
def test_parallel_decodes_with_a_cache(sources):
    names = list(sources)
    model = composed(sources, {"parallel": names})
    ids = IDS.repeat(len(names), 1)
    start = model(ids[:, :5], use_cache=True)
    rest = model(ids[:, 5:], past_key_values=start.past_key_values).logits
    close(torch.cat([start.logits, rest], dim=1), logits(model, ids))


@torch.no_grad()
def test_attention_and_its_projections_both_adapted_run_the_cache_once(sources):
    model = composed(sources, {"average": ["bottleneck", "lora"], "weights": [1, 1]})
    start = model(IDS[:, :5], use_cache=True)
    assert start.past_key_values.get_seq_length() == 5
    rest = model(IDS[:, 5:], past_key_values=start.past_key_values).logits
    close(torch.cat([start.logits, rest], dim=1), logits(model))
    assert same_bits(bits(model.unload()), bits(tiny.llama()))


@torch.no_grad()
def test_module_runs_once_for_all_sources(sources):
    layer = layer_at(composed(sources, {"average": ["lora", "hydra"]}), "layers.0.mlp.down_proj")
    calls = []
    layer.base_layer.register_forward_hook(lambda *given: calls.append(1))
    layer(torch.randn(1, 2, 96))
    assert len(calls) == 1
    again = copy.deepcopy(layer)
    assert isinstance(again.once, Once)
    assert again.once.base_layer is again.base_layer


def test_yaml_to_model_and_back(sources, tmp_path, base):
    written = {"average": [{"stack": ["lora", "hydra"]}, {"fuse": ["ia3", "bottleneck"], "by": "scalearn++"}]}
    file = tmp_path / "composition.yaml"
    file.write_text(yaml.safe_dump({"base": str(base), "sources": sources, "compose": written}))
    model = compose(file)
    config: Any = model.peft_config["default"]
    assert data(config.tree()) == {**written, "weights": [0.5, 0.5]}
    assert parse(data(config.tree())) == config.tree()
    randomise(model)
    loaded = PeftModel.from_pretrained(tiny.llama(), save(model, tmp_path / "out"))
    assert torch.equal(logits(loaded), logits(model))
    assert loaded.peft_config["default"].compose == written


def test_trains_what_has_parameters_alone(sources):
    model = composed(sources, {"stack": ["lora", {"fuse": ["ia3", "hydra"], "by": "scalearn_uniform"}]})
    names = [name for name, value in model.named_parameters() if value.requires_grad]
    assert names
    assert all(".fuse_0.scale" in name for name in names)
    model(IDS, labels=IDS).loss.backward()
    assert sum(float(value.grad.abs().sum()) for name, value in model.named_parameters() if name in names) > 0


def test_one_configuration_makes_the_same_model_twice(sources):
    config = config_of("composition", sources=sources, compose="lora")
    from peft import get_peft_model

    first = logits(get_peft_model(tiny.llama(), config))
    assert torch.equal(first, logits(get_peft_model(tiny.llama(), config)))


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        (3, "compose: expected a name or one of stack, average, parallel, fuse, got 3"),
        ({"stack": []}, r"compose.stack: expected a list"),
        ({"stack": ["a"], "weight": 1}, "compose.weight: stack has no key 'weight'"),
        ({"average": ["a", "b"], "weights": [1]}, "compose.weights: expected 2 numbers"),
        ({"average": ["a", {"fuse": ["b"], "by": "scalern"}]}, r"compose.average\[1\].by: no rule 'scalern'; did you"),
        ({"fuse": ["a"], "by": "adapter_fusion", "start": 1}, "compose.start: expected a number, and a rule with scal"),
        ({"stack": ["a", "a"]}, "a is named twice"),
    ],
)
def test_wrong_trees(tree, message):
    with pytest.raises(SpecError, match=message):
        parse(tree)


def test_all_faults_of_a_tree_at_once():
    with pytest.raises(SpecError) as error:
        parse({"stack": [1, {"average": ["a"], "weights": "x"}, {"parallel": []}]})
    assert len(error.value.problems) == 3


def test_mistakes(sources, tmp_path, base):
    with pytest.raises(SpecError, match="names other, which sources do not have"):
        compose({"base": str(base), "sources": sources, "compose": {"stack": ["lora", "other"]}})
    with pytest.raises(MissingError):
        compose({"base": str(base), "sources": {"a": str(tmp_path / "nowhere")}})
    narrow = attach(tiny.llama(hidden_size=32), "lora", target_modules=["q_proj"])
    folder = save(narrow, tmp_path / "narrow")
    with pytest.raises(CheckpointError, match="size mismatch"):
        composed({"a": str(folder)}, "a")
    prefixed = saved_source(tmp_path / "mam", "mix_and_match", prefix=2, size=3)[0]
    with pytest.raises(UnsupportedError, match="prefixes run the attention in their own way; stack them"):
        composed(sources | {"mam": prefixed}, {"average": ["lora", "mam"]})
    stacked = composed(sources | {"mam": prefixed}, {"stack": ["lora", "mam"]})
    assert logits(stacked).isfinite().all()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"peft_type": "NEW"}, "a peft_type that PEFT knows, got 'NEW'"),
        ({"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 2}, "PROMPT_TUNING adapters are more than layers"),
        ({"peft_type": "POLY"}, "fold it for one task first"),
        ({"peft_type": "LORA", "modules_to_save": ["lm_head"]}, "uses modules_to_save"),
        ({"peft_type": "LORA", "bias": "all"}, "uses bias"),
        ({"peft_type": "LORA", "init_lora_weights": "pissa"}, "changed the base"),
    ],
)
def test_what_cannot_be_composed(fields, message):
    with pytest.raises(UnsupportedError, match=message):
        source_config(fields)


def test_tree_as_data():
    assert data(Average((Leaf("a"), Stack((Leaf("b"),))), (1.0, 2.0))) == {
        "average": ["a", {"stack": ["b"]}],
        "weights": [1.0, 2.0],
    }


def test_gpt2(tmp_path):
    model = attach(gpt2(), "bottleneck", size=3, variant="houlsby")
    randomise(model)
    folder = save(model, tmp_path / "a")
    assert torch.equal(logits(attach(gpt2(), "composition", sources={"a": str(folder)}, compose="a")), logits(model))
