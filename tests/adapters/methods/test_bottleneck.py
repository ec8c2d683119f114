"""`bottleneck` against the same arithmetic in hooks on a plain model, and against the papers' counts."""

from __future__ import annotations

import pytest
import torch

from tests import tiny
from tests.adapters.laws import HIDDEN, LAYERS, Example, attach, close, config_of, gpt2, logits, randomise
from toolkit.adapters.methods._unified import UnifiedLayer
from toolkit.adapters.methods.bottleneck import BottleneckConfig

SIZE = 6
ONE = 2 * HIDDEN * SIZE + SIZE + HIDDEN
EXAMPLE = Example({"variant": "houlsby", "size": SIZE, "scale": 2.0}, 2 * LAYERS * ONE, folds=False, is_lora=False)


def hook(layer: UnifiedLayer, act, scale: float = 1.0, *, parallel: bool = False):
    """Return a forward hook that adds the same bottleneck to what a sublayer returns."""
    down, up = layer.tensor("default", "down").data, layer.tensor("default", "up").data
    down_bias, up_bias = layer.tensor("default", "down_bias").data, layer.tensor("default", "up_bias").data

    def add(module, args, kwargs, output):
        y = output[0] if isinstance(output, tuple) else output
        h = (args[0] if args else kwargs["hidden_states"]) if parallel else y
        y = y + scale * (act(h @ down.T + down_bias) @ up.T + up_bias)
        return (y, *output[1:]) if isinstance(output, tuple) else y

    return add


def hooked(model, adapted, act, scale=1.0, *, parallel=False):
    """Put the adapters of one model into a plain one as hooks."""
    count = 0
    for name, layer in adapted.get_base_model().named_modules():
        if isinstance(layer, UnifiedLayer):
            model.get_submodule(name).register_forward_hook(
                hook(layer, act, scale, parallel=parallel), with_kwargs=True
            )
            count += 1
    return model, count


@pytest.mark.system("unified_peft")
@pytest.mark.parametrize("make", [tiny.llama, gpt2])
@pytest.mark.parametrize(("variant", "places"), [("houlsby", 2), ("pfeiffer", 1)])
@pytest.mark.parametrize("activation", ["relu", "gelu", "silu", "tanh"])
def test_is_a_bottleneck_after_the_sublayer(make, variant, places, activation):
    act = getattr(torch.nn.functional, activation, torch.tanh)
    model = attach(make(), "bottleneck", variant=variant, size=SIZE, activation=activation)
    randomise(model)
    plain, count = hooked(make(), model, act)
    assert count == places * LAYERS
    close(logits(model), logits(plain), 1e-6)


@pytest.mark.system("unified_peft")
def test_scale_and_count():
    model = attach(tiny.llama(), "bottleneck", size=SIZE, scale=0.5)
    randomise(model)
    close(logits(model), logits(hooked(tiny.llama(), model, torch.relu, 0.5)[0]), 1e-6)
    assert sum(v.numel() for v in model.parameters() if v.requires_grad) == LAYERS * ONE


@pytest.mark.system("unified_peft")
@pytest.mark.parametrize("make", [tiny.llama, gpt2])
def test_linear_one_after_a_linear_folds(make):
    """`(1 + s U D) W` and `(1 + s U D) b + s (U d + u)`."""
    biases = make is gpt2
    model = attach(
        make(), "bottleneck", size=SIZE, activation="identity", scale=0.5, biases=biases, target_modules="all-linear"
    )
    randomise(model)
    attached = logits(model)
    layer = next(m for m in model.modules() if isinstance(m, UnifiedLayer))
    d, u = layer.tensor("default", "down").data, layer.tensor("default", "up").data
    after = torch.eye(len(u)) + 0.5 * u @ d
    close(layer.base_weight + layer.fold("default").weight, after @ layer.base_weight)
    if biases:
        inner = u @ layer.tensor("default", "down_bias").data + layer.tensor("default", "up_bias").data
        close(layer.base_bias + layer.fold("default").bias, after @ layer.base_bias + 0.5 * inner)
    close(logits(model.merge_and_unload()), attached)


def test_sublayers_of_unknown_names():
    model = tiny.llama()
    for layer in model.model.layers:
        layer.odd = layer.mlp
        del layer.mlp
    with pytest.raises(ValueError, match="no ffn sublayer of a known name in this model; name its target_modules"):
        attach(model, "bottleneck")


def test_named_sublayers():
    model = attach(tiny.llama(), "bottleneck", size=SIZE, target_modules=["layers.1.mlp"])
    names = [name for name, m in model.named_modules() if isinstance(m, UnifiedLayer)]
    assert names == ["base_model.model.model.layers.1.mlp"]
    assert sorted(attach(tiny.llama(), "bottleneck", variant="houlsby").peft_config["default"].target_modules) == [
        "mlp",
        "self_attn",
    ]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"variant": "other"}, "variant is houlsby or pfeiffer, not 'other'"),
        ({"size": 0}, "size 0 .* changes nothing"),
        ({"scale": 0.0}, "changes nothing"),
        ({"activation": "cube"}, "activation is one of relu, gelu, silu, tanh, identity, not 'cube'"),
    ],
)
def test_wrong_fields(fields, message):
    with pytest.raises(ValueError, match=message):
        BottleneckConfig(**fields)
    assert config_of("bottleneck").size == 64
