"""`adapter_fusion` against softmax attention written out, and its limits: one source, equal keys, one key that wins."""

from __future__ import annotations

import torch

from tests import tiny
from tests.adapters.laws import HIDDEN, LAYERS, Example, attach, close, logits, randomise
from tests.adapters.methods.test_scalearn import lora, saved_source
from toolkit.adapters.methods.adapter_fusion import AdapterFusionLayer

SOURCES = {name: lora(2, ["q_proj", "c_attn"]) | {"lora_alpha": 1} for name in ("one", "two")}
EXAMPLE = Example(
    {"sources": SOURCES}, count=3 * HIDDEN * HIDDEN * LAYERS, starts_at_base=False, folds=False, is_lora=False
)


def layers(model: torch.nn.Module) -> list[AdapterFusionLayer]:
    return [module for module in model.modules() if isinstance(module, AdapterFusionLayer)]


def rule(layer: AdapterFusionLayer):
    return layer.adapter_fusion_rules["default"]["fuse_0"]


def test_is_attention_of_the_output_over_the_sources():
    model = attach(tiny.llama(), "adapter_fusion", sources=SOURCES).double()
    randomise(model)
    layer = layers(model)[1]
    x = torch.randn(2, 5, HIDDEN, dtype=torch.float64)
    fusion, sources = rule(layer), layer.adapter_fusion_sources["default"]
    with torch.no_grad():
        y = layer.base_layer(x)
        got = layer(x)
        differences = [getattr(sources, f"of_{n}").get_delta_weight(n) for n in SOURCES]
        for b in range(2):
            for t in range(5):
                parts = [x[b, t] @ delta.T for delta in differences]
                scores = torch.stack([(fusion.query @ y[b, t]) @ (fusion.key @ part) for part in parts])
                shares = scores.softmax(0)
                mixed = sum(share * (fusion.value @ part) for share, part in zip(shares, parts, strict=True))
                torch.testing.assert_close(got[b, t], y[b, t] + mixed, rtol=1e-11, atol=1e-11)


def test_one_source_is_that_adapter(tmp_path):
    folder, expected = saved_source(tmp_path / "a", "bottleneck", size=4, variant="houlsby")
    model = attach(tiny.llama(), "adapter_fusion", sources={"a": folder})
    close(logits(model), expected, 1e-6)


def test_equal_keys_average_and_a_winning_key_decides(tmp_path):
    sources = {n: saved_source(tmp_path / n, "bottleneck", seed=i, size=4) for i, n in enumerate("ab")}
    paths = {name: folder for name, (folder, _) in sources.items()}
    model = attach(tiny.llama(), "adapter_fusion", sources=paths)
    for layer in layers(model):
        rule(layer).query.data.zero_()
    average = attach(tiny.llama(), "composition", sources=paths)
    close(logits(model), logits(average), 1e-6)
    layer, x = layers(model)[0], torch.randn(1, 1, HIDDEN)
    with torch.no_grad():
        branch = layer.built["default"].branches
        y, outputs = layer.base_layer(x), [one(x) for one in branch]
        rule(layer).key.data = torch.eye(HIDDEN)
        # Q maps y to a large multiple of the second difference, which that one answers best.
        rule(layer).query.data = 1e6 * torch.outer((outputs[1] - outputs[0])[0, 0], y[0, 0])
        close(layer(x), outputs[1], 1e-5)
