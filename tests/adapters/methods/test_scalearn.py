"""`scalearn` against sums of outputs in hooks, LoRAs of concatenated ranks, and the paper's counts."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from tests import tiny
from tests.adapters.laws import (
    HIDDEN,
    KEYS,
    LAYERS,
    LINEARS,
    Example,
    attach,
    bits,
    close,
    config_of,
    gpt2,
    grads,
    logits,
    randomise,
    save,
)
from toolkit.adapters.fold import fold
from toolkit.adapters.methods.scalearn import ScalearnLayer

pytestmark = pytest.mark.system("scalearn")


def lora(r: int, targets: str | list[str] = "all-linear") -> dict[str, object]:
    """A LoRA that PEFT starts with random factors."""
    return {"peft_type": "LORA", "r": r, "init_lora_weights": False, "target_modules": targets}


SOURCES = {"one": lora(2), "two": lora(3)}
OUTPUTS = sum(outputs for _, outputs in LINEARS.values())
EXAMPLE = Example({"sources": SOURCES}, count=2 * LAYERS * OUTPUTS, starts_at_base=False)

PFEIFFER = {"peft_type": "BOTTLENECK", "size": 4}


def layers(model: torch.nn.Module) -> list[ScalearnLayer]:
    return [module for module in model.modules() if isinstance(module, ScalearnLayer)]


def set_scales(model: PeftModel, values: list[float] | torch.Tensor) -> None:
    for name, value in model.named_parameters():
        if ".scale" in name:
            value.data = torch.as_tensor(values).reshape(len(values), -1).expand_as(value).clone()


def saved_source(folder, method: str = "bottleneck", seed: int = 0, **fields):
    """Save a random adapter; return its folder and its logits."""
    model = attach(tiny.llama(), method, **fields)
    randomise(model, seed)
    return str(save(model, folder)), logits(model)


@pytest.fixture
def sources(tmp_path):
    """Three random bottleneck adapters and the logits of each."""
    return {name: saved_source(tmp_path / name, seed=i, size=4) for i, name in enumerate(("a", "b", "c"))}


def paths(sources) -> dict[str, str]:
    return {name: folder for name, (folder, _) in sources.items()}


@pytest.mark.parametrize(("uniform", "shared"), [(False, False), (True, False), (False, True), (True, True)])
def test_one_hot_is_that_adapter_and_zero_is_the_base(sources, uniform, shared):
    model = attach(tiny.llama(), "scalearn", sources=paths(sources), uniform=uniform, shared=shared)
    for i, (_, expected) in enumerate(sources.values()):
        set_scales(model, [float(i == j) for j in range(3)])
        close(logits(model), expected, 1e-6)
    set_scales(model, [0.0, 0.0, 0.0])
    assert torch.equal(logits(model), logits(tiny.llama()))


def test_constant_vectors_are_uniform_scales(sources):
    vectors, numbers = (attach(tiny.llama(), "scalearn", sources=paths(sources), uniform=u) for u in (False, True))
    for model in (vectors, numbers):
        set_scales(model, [0.3, -1.2, 0.8])
    assert torch.equal(logits(vectors), logits(numbers))


def test_module_is_linear_in_the_scales():
    model = attach(tiny.llama(), "scalearn", sources=SOURCES)
    layer, x = layers(model)[0], torch.randn(5, HIDDEN)
    outputs = []
    torch.manual_seed(0)
    first, second = torch.randn(2, HIDDEN), torch.randn(2, HIDDEN)
    with torch.no_grad():
        for scales in (first, second, first + second):
            layer.scalearn_rules["default"]["fuse_0"].scale.data = scales
            outputs.append(layer(x) - layer.base_layer(x))
    close(outputs[0] + outputs[1], outputs[2])


def test_is_a_sum_over_what_peft_computes():
    """The residual outside, and no softmax: with PEFT's own LoRA layers and a loop."""
    model = attach(tiny.llama(), "scalearn", sources=SOURCES)
    randomise(model)
    layer, x = layers(model)[3], torch.randn(2, 7, HIDDEN)
    scales = layer.scalearn_rules["default"]["fuse_0"].scale.detach()
    with torch.no_grad():
        base = layer.base_layer(x)
        expected = base.clone()
        for scale, name in zip(scales, SOURCES, strict=True):
            source = getattr(layer.scalearn_sources["default"], f"of_{name}")
            expected += scale * (x @ source.lora_A[name].weight.T @ source.lora_B[name].weight.T * source.scaling[name])
        close(layer(x), expected)


@pytest.mark.parametrize(
    ("fields", "count"),
    [
        ({}, 8 * HIDDEN * LAYERS),
        ({"uniform": True}, 8 * LAYERS),
        ({"shared": True}, 8 * HIDDEN),
        ({"uniform": True, "shared": True}, 8),
    ],
)
def test_counts_of_the_paper(fields, count):
    sources = {f"task_{i}": PFEIFFER for i in range(8)}
    model = attach(tiny.llama(), "scalearn", sources=sources, **fields)
    assert sum(v.numel() for v in model.parameters() if v.requires_grad) == count
    fusion = attach(tiny.llama(), "adapter_fusion", sources=sources)
    assert sum(v.numel() for v in fusion.parameters() if v.requires_grad) == 3 * HIDDEN * HIDDEN * LAYERS
    assert pytest.approx(0.00347, abs=5e-6) == 8 * 768 / (3 * 768 * 768), "the abstract's share of AdapterFusion"


def test_shared_scales_are_one_parameter_and_get_all_gradients():
    """The gradient of a shared scale is the sum of those of the same model with scales of its own in each layer."""
    fields = {"sources": SOURCES, "uniform": True}
    own, shared = attach(tiny.llama(), "scalearn", **fields), attach(tiny.llama(), "scalearn", **fields, shared=True)
    for model in (own, shared):
        set_scales(model, [0.4, 0.7])
    shared.load_state_dict({k: v for k, v in own.state_dict().items() if "_sources" in k}, strict=False)
    (total,) = grads(shared).values()
    close(total, sum(grads(own).values()), 1e-4)
    assert not any("_sources" in name for name, _ in own.named_parameters())


def test_start():
    for fields, value in (({}, 0.5), ({"start": 1.5}, 1.5)):
        rule = layers(attach(tiny.llama(), "scalearn", sources=SOURCES, **fields))[0].scalearn_rules["default"]
        assert torch.equal(rule["fuse_0"].scale, torch.full((2, HIDDEN), value))


@pytest.mark.parametrize("make", [tiny.llama, gpt2])
@pytest.mark.parametrize("uniform", [False, True])
@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False but the target module is `Conv1D`")
def test_folds_into_one_lora_of_all_ranks(make, uniform, tmp_path):
    model = attach(make(), "scalearn", sources=SOURCES, uniform=uniform)
    randomise(model, strength=0.6)
    folder = fold(model, tmp_path / "lora")
    loaded = PeftModel.from_pretrained(make(), folder)
    assert type(loaded.peft_config["default"]) is LoraConfig
    assert loaded.peft_config["default"].r == 5
    close(logits(loaded), logits(model))
    if make is tiny.llama:  # of gpt2 PEFT takes the weights the other way round
        layer = layers(model)[1]
        source, scales = layer.scalearn_sources["default"], layer.scalearn_rules["default"]["fuse_0"].scale.detach()
        deltas = [getattr(source, f"of_{name}").get_delta_weight(name) for name in SOURCES]
        close(
            layer.fold("default").weight,
            sum(s[:, None] * delta for s, delta in zip(scales.expand(2, layer.sizes[1]), deltas, strict=True)),
        )


def test_sources_on_other_modules(tmp_path):
    """A source that does nothing at a module counts nothing there."""
    folder, expected = saved_source(tmp_path / "a", "hydra_lora", target_modules=["q_proj"])
    other, _ = saved_source(tmp_path / "b", "hydra_lora", target_modules=["v_proj"])
    model = attach(tiny.llama(), "scalearn", sources={"a": folder, "b": other})
    assert sorted({layer.sizes[1] for layer in layers(model)}) == [KEYS, HIDDEN]
    set_scales(model, [1.0, 0.0])
    close(logits(model), expected, 1e-6)


def test_sources_are_fixed_and_need_no_folder(sources, tmp_path):
    model = attach(tiny.llama(), "scalearn", sources=paths(sources))
    before = {name: value for name, value in bits(model).items() if "_sources" in name}
    optimizer = torch.optim.SGD([v for v in model.parameters() if v.requires_grad], lr=1.0)
    grads(model)
    optimizer.step()
    assert all(torch.equal(bits(model)[name], value) for name, value in before.items())
    model.set_adapter("default")
    folder = save(model, tmp_path / "composed")
    for name in sources:
        (tmp_path / name).rename(tmp_path / f"gone_{name}")
    assert torch.equal(logits(PeftModel.from_pretrained(tiny.llama(), folder)), logits(model))


def test_mistakes(tmp_path):
    with pytest.raises(ValueError, match="name the adapters to put together"):
        attach(tiny.llama(), "scalearn")
    with pytest.raises(ValueError, match=r"cannot be called 'a\.b'"):
        config_of("scalearn", sources={"a.b": lora(1)})
    plain = get_peft_model(tiny.llama(), LoraConfig(target_modules=["q_proj"]))
    folder = save(plain, tmp_path / "lora")
    (folder / "adapter_model.safetensors").unlink()
    from toolkit.errors import CheckpointError

    with pytest.raises(CheckpointError, match=r"no adapter_model\.safetensors"):
        attach(tiny.llama(), "scalearn", sources={"a": str(folder)})


def test_scales_keep_to_their_sources_whatever_their_order(sources, tmp_path):
    given = dict(reversed(paths(sources).items()))
    model = attach(tiny.llama(), "scalearn", sources=given, uniform=True)
    set_scales(model, [0.2, 0.5, 1.1])
    again = PeftModel.from_pretrained(tiny.llama(), save(model, tmp_path / "out"))
    assert torch.equal(logits(model), logits(again))
