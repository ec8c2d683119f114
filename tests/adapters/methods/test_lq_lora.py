"""`lq_lora` against the published NF4, brute force over all formats, and decompositions whose error is known."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from tests import tiny
from tests.adapters.laws import IDS, LAYERS, LINEARS, Example, attach, gpt2, grads, logits
from toolkit.adapters.methods._normal_float import dequantize, normal_values, quantize, storage_bits
from toolkit.adapters.methods.lq_lora import FORMATS, LqLoraLinear, choose, decompose, squared_gradients

RANK = 2
EXAMPLE = Example(
    {"r": RANK, "budget": 3.5, "iterations": 1},
    LAYERS * sum(RANK * (i + o) for i, o in LINEARS.values()),
    starts_at_base=False,
    is_lora=False,
)

NF4 = (
    "-1 -0.6961928009986877 -0.5250730514526367 -0.39491748809814453 -0.28444138169288635 -0.18477343022823334 "
    "-0.09105003625154495 0 0.07958029955625534 0.16093020141124725 0.24611230194568634 0.33791524171829224 "
    "0.44070982933044434 0.5626170039176941 0.7229568362236023 1"
)
"""As QLoRA's paper prints it."""


def layers(model: torch.nn.Module) -> list[LqLoraLinear]:
    return [m for m in model.modules() if isinstance(m, LqLoraLinear)]


def to_3_bits(x: torch.Tensor) -> torch.Tensor:
    """A stand-in: seven equally distant values up to the largest magnitude of all."""
    scale = x.abs().max() / 3
    return (x / scale).round().clamp(-3, 3) * scale


@pytest.mark.system("lq_lora")
def test_values_are_normal_quantiles():
    np.testing.assert_allclose(normal_values(4), [float(v) for v in NF4.split()], atol=1e-6)
    for bits in (2, 3, 8):
        values = normal_values(bits)
        assert len(values) == 2**bits
        assert (float(values[0]), float(values[-1])) == (-1, 1)
        assert (values == 0).sum() == 1
        assert (values.diff() > 0).all()


@pytest.mark.system("lq_lora")
@pytest.mark.parametrize(("bits", "block"), FORMATS)
def test_codes_are_the_nearest_values_and_take_their_bits(bits, block):
    torch.manual_seed(0)
    x = torch.randn(13, 37)
    codes, scales = quantize(x, bits, block)
    assert 8 * len(codes) + 16 * len(scales) < storage_bits(x.numel(), bits, block) + 8
    back = dequantize(codes, scales, (13, 37), bits, block)
    scale = scales.float().repeat_interleave(block)[: x.numel()]
    every = (normal_values(bits)[None] * scale[:, None] - x.flatten()[:, None]).abs().min(1).values
    torch.testing.assert_close((back - x).abs().flatten(), every, rtol=1e-5, atol=1e-6)


@pytest.mark.system("lq_lora")
def test_error_is_not_monotone_and_the_best_turn_is_taken():
    """Every turn by hand in numpy: the first rise ends it, and what came before is the result."""
    rises = 0
    for seed in range(12):
        torch.manual_seed(seed)
        weight = torch.randn(24, 20, dtype=torch.float64)
        quantised, errors = np.zeros((24, 20)), []
        for _ in range(30):
            u, s, v = np.linalg.svd(weight.numpy() - quantised)
            low = (u[:, :4] * s[:4]) @ v[:4]
            quantised = to_3_bits(weight - torch.from_numpy(low)).numpy()
            errors.append(np.linalg.norm(weight.numpy() - low - quantised))
        first_rise = next((i for i in range(1, 30) if errors[i] >= errors[i - 1]), 30)
        found = decompose(weight, 4, to_3_bits, 30)
        assert found.error == pytest.approx(min(errors[:first_rise]), rel=1e-9)
        assert found.error == pytest.approx(errors[first_rise - 1], rel=1e-9)
        back = found.b @ found.a + to_3_bits(found.rest)
        assert float((weight - back).norm()) == pytest.approx(found.error, rel=1e-9)
        rises += first_rise < 30
        assert found.error < 0.8 * float((weight - to_3_bits(weight)).norm())
    assert rises > 6, "the error does rise"


@pytest.mark.system("lq_lora")
def test_full_rank_and_exact_rounding_leave_nothing():
    torch.manual_seed(0)
    weight = torch.randn(24, 20, dtype=torch.float64)
    assert decompose(weight, 20, to_3_bits, 5).error < 1e-12
    for rank in (1, 7):
        assert decompose(weight, rank, lambda x: x, 5).error < 1e-12


@pytest.mark.system("lq_lora")
def test_constant_importance_counts_for_nothing_and_other_importance_does():
    torch.manual_seed(0)
    weight = torch.randn(24, 20, dtype=torch.float64)
    plain = decompose(weight, 3, to_3_bits, 10)
    constant = decompose(weight, 3, to_3_bits, 10, torch.full((24, 20), 7.0))
    torch.testing.assert_close(constant.b @ constant.a, plain.b @ plain.a, rtol=1e-9, atol=1e-9)
    rows = torch.ones(24, 1, dtype=torch.float64)
    rows[:5] = 100.0
    weighted = decompose(weight, 3, to_3_bits, 10, rows.expand(24, 20))

    def left(found, chosen):
        return float((weight - found.b @ found.a - to_3_bits(found.rest))[chosen].norm())

    assert left(weighted, slice(0, 5)) < left(plain, slice(0, 5))


@pytest.mark.system("lq_lora")
def test_formats_are_the_best_of_all():
    rng = np.random.default_rng(0)
    for _ in range(30):
        sizes = rng.integers(1, 50, (5, 4)).astype(float)
        errors = rng.random((5, 4))
        budget = float(rng.uniform(sizes.min(1).sum(), sizes.max(1).sum()))
        every = [list(c) for c in product(range(4), repeat=5) if sizes[range(5), list(c)].sum() <= budget]
        best = min(errors[range(5), c].sum() for c in every)
        found = choose(sizes, errors, budget)
        assert sizes[range(5), found].sum() <= budget + 1e-6
        assert errors[range(5), found].sum() == pytest.approx(best, abs=1e-6)


@pytest.mark.system("lq_lora")
@pytest.mark.parametrize("make", [tiny.llama, gpt2])
def test_layer_computes_with_the_sum_and_the_codes_get_no_gradient(make):
    model = attach(make(), "lq_lora", **EXAMPLE.config)
    for layer in layers(model):
        a, b = layer.tensor("default", "a"), layer.tensor("default", "b")
        x = torch.randn(3, layer.sizes[0])
        bias = layer.base_bias
        wanted = x @ (layer.quantised("default") + b @ a).T + (0 if bias is None else bias)
        torch.testing.assert_close(layer(x), wanted, rtol=1e-4, atol=1e-4)
    assert all(".lq_lora_a." in name or ".lq_lora_b." in name for name in grads(model))


@pytest.mark.system("lq_lora")
def test_budget_is_kept_and_more_bits_are_nearer():
    plain, errors = logits(tiny.llama()), []
    for budget in (2.25, 3.0, 4.0, 8.5):
        model = attach(tiny.llama(), "lq_lora", r=2, budget=budget, iterations=3)
        used = sum(
            8 * len(m.tensor("default", "codes")) + 16 * len(m.tensor("default", "scales")) for m in layers(model)
        )
        total = sum(m.sizes[0] * m.sizes[1] for m in layers(model))
        assert used <= budget * total + 8 * len(layers(model))
        assert used > 0.9 * budget * total or budget > 8
        errors.append(float((logits(model) - plain).norm() / plain.norm()))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.05
    with pytest.raises(ValueError, match=r"budget is at least 2\.06\d bits here, not 1"):
        attach(tiny.llama(), "lq_lora", budget=1.0)


def test_squared_gradients_are_autograds_and_are_read(tmp_path):
    model: Any = tiny.llama()
    found = squared_gradients(model, [{"input_ids": IDS[i : i + 1], "labels": IDS[i : i + 1]} for i in range(2)])
    weight, wanted = model.model.layers[1].mlp.up_proj.weight, 0
    for i in range(2):
        (gradient,) = torch.autograd.grad(model(IDS[i : i + 1], labels=IDS[i : i + 1]).loss, weight)
        wanted = wanted + gradient**2 / 2
    torch.testing.assert_close(found["model.layers.1.mlp.up_proj"], wanted)
    save_file(found, tmp_path / "fisher.safetensors")
    config = {"r": 2, "budget": 3.0, "iterations": 3, "fisher": str(tmp_path / "fisher.safetensors")}
    weighted, plain = (attach(tiny.llama(), "lq_lora", **c) for c in (config, config | {"fisher": None}))
    losses = []
    for adapted in (weighted, plain):
        with torch.no_grad():
            losses.append(float((logits(adapted) - logits(tiny.llama())).norm()))
    assert losses[0] != losses[1]
