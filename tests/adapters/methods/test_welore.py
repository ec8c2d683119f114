"""`welore` against singular values in numpy, planted ranks, and what two factors save."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tests import tiny
from tests.adapters.laws import IDS, LAYERS, Example, attach, bits, config_of, gpt2, logits
from toolkit.adapters.methods.welore import WeloreLinear, normalised, rank_of, threshold

TAU = 0.5


def wanted_ranks(model: nn.Module, tau: float = TAU) -> dict[str, int]:
    """Every projection's rank by the rule, for `min_ratio` 0."""
    found = {}
    for name, p in model.named_parameters():
        if "_proj.weight" in name:
            s = np.linalg.svd(p.detach().double().numpy(), compute_uv=False)
            rank = int(((s - s.min()) / (s.max() - s.min()) >= tau).sum())
            if rank < p.numel() / sum(p.shape):
                found[name.removesuffix(".weight")] = rank
    return found


FIELDS = {"tau": TAU, "min_ratio": 0.0}
_MODEL: Any = tiny.llama()
COUNT = sum(r * sum(_MODEL.get_submodule(key).weight.shape) for key, r in wanted_ranks(_MODEL).items())
EXAMPLE = Example(FIELDS, COUNT, starts_at_base=False, is_lora=False)


def layers(model: nn.Module) -> dict[str, WeloreLinear]:
    return {n.removeprefix("base_model.model."): m for n, m in model.named_modules() if isinstance(m, WeloreLinear)}


@pytest.mark.system("welore")
@pytest.mark.parametrize("make", [tiny.llama, gpt2])
def test_error_is_the_root_of_what_is_dropped(make):
    model: Any = attach(make(), "welore", **FIELDS)
    found = layers(model)
    assert any(layer.replaces("default") for layer in found.values())
    for key, layer in found.items():
        if not layer.replaces("default"):
            continue
        weight = layer.base_weight.double()
        s = torch.linalg.svdvals(weight)
        rank = model.peft_config["default"].ranks[key]
        error = (layer.whole("default").detach().double() - weight).norm()
        assert float(error) == pytest.approx(float(s[rank:].square().sum().sqrt()), rel=1e-4)
        x = torch.randn(3, layer.sizes[0])
        torch.testing.assert_close(layer.product("default", x), x @ layer.whole("default").T, rtol=1e-4, atol=1e-4)
        a, b = layer.tensor("default", "a").detach(), layer.tensor("default", "b").detach()
        torch.testing.assert_close(a @ a.T, torch.diag(s[:rank]).float(), rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(b.T @ b, torch.diag(s[:rank]).float(), rtol=1e-4, atol=1e-3)


@pytest.mark.system("welore")
def test_ranks_are_those_of_the_rule():
    model: Any = attach(tiny.llama(), "welore", **FIELDS)
    assert model.peft_config["default"].ranks == wanted_ranks(tiny.llama())
    assert len(layers(model)) == LAYERS * 7


@pytest.mark.system("welore")
def test_rank_falls_with_tau_and_does_not_depend_on_scale():
    torch.manual_seed(0)
    s = torch.linalg.svdvals(torch.randn(30, 50, dtype=torch.float64))
    shape = torch.Size((300, 500))  # factors of any rank up to 30 save
    ranks = [rank_of(normalised(s), shape, tau, 0.0) or 30 for tau in np.linspace(0, 1, 40)]
    assert ranks == sorted(ranks, reverse=True)
    assert ranks[-1] == 1
    assert rank_of(normalised(s), shape, 0.0, 0.0) is None, "nothing is dropped: the matrix stays"
    for scale in (1e-6, 1e6):
        assert [rank_of(normalised(scale * s), shape, t, 0.0) or 30 for t in np.linspace(0, 1, 40)] == ranks
    assert rank_of(normalised(torch.ones(30)), shape, 0.9, 0.0) is None, "a flat spectrum has no low rank"


@pytest.mark.system("welore")
def test_factors_must_save():
    values = torch.cat([torch.ones(5), torch.zeros(4)])
    assert rank_of(values, torch.Size((12, 9)), 0.5, 0.0) == 5
    values = torch.cat([torch.ones(6), torch.zeros(3)])
    assert rank_of(values, torch.Size((12, 9)), 0.5, 0.0) is None, "12 * 9 / (12 + 9) is 5.14"


@pytest.mark.system("welore")
@pytest.mark.parametrize("reduction", [0.1, 0.37, 0.8])
def test_threshold_drops_the_wanted_share(reduction):
    torch.manual_seed(0)
    values = [normalised(torch.linalg.svdvals(torch.randn(20 + i, 40))) for i in range(6)]
    total = sum(map(len, values))
    dropped = sum(int((s < threshold(values, reduction)).sum()) for s in values)
    assert abs(dropped - reduction * total) <= 1


@pytest.mark.system("welore")
def test_planted_ranks_are_found_and_the_rest_is_neither_changed_nor_trained():
    model: Any = tiny.llama()
    torch.manual_seed(0)
    for key, module in model.named_modules():
        if key.endswith("_proj"):
            out, inputs = module.weight.shape
            low = torch.randn(out, 3) @ torch.randn(3, inputs) / 30
            flat = nn.init.orthogonal_(torch.empty(out, inputs))
            module.weight.data = low if key.endswith(("up_proj", "o_proj")) else flat
    plain = logits(model)
    adapted: Any = attach(model, "welore", reduction=0.3125, min_ratio=0.5)
    ranks = adapted.peft_config["default"].ranks
    assert ranks == {
        f"model.layers.{i}.{name}": 3 for i in range(LAYERS) for name in ("self_attn.o_proj", "mlp.up_proj")
    }
    torch.testing.assert_close(logits(adapted), plain, rtol=1e-3, atol=1e-3)
    before = bits(adapted)
    optimizer = torch.optim.AdamW(adapted.parameters(), 1e-2)
    adapted(IDS, labels=IDS).loss.backward()
    optimizer.step()
    moved = {name for name, value in bits(adapted).items() if not torch.equal(value, before[name])}
    assert moved == {f"base_model.model.{k}.welore_{f}.default" for k in ranks for f in "ab"}


def test_a_base_without_low_ranks_is_refused():
    with pytest.raises(ValueError, match="no matrix becomes low-rank"):
        attach(tiny.llama(), "welore", tau=0.0)
    with pytest.raises(ValueError, match="tau lies between 0 and 1"):
        config_of("welore", tau=2.0)
