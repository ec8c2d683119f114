"""`dsee` against its formula in float64, PEFT's LoRA, numpy's order of all weights, and heads that are cut out."""

from __future__ import annotations

from itertools import pairwise
from math import floor

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from tests import tiny
from tests.adapters.laws import (
    IDS,
    LAYERS,
    LINEARS,
    Example,
    attach,
    bits,
    close,
    config_of,
    gpt2,
    logits,
    randomise,
    save,
)
from toolkit.adapters.methods._decompose import low_rank_plus_sparse
from toolkit.adapters.methods._masks import pack_bits, smallest, unpack_bits
from toolkit.adapters.methods.dsee import DseeConfig, DseeLinear, prune, prune_units, unit_penalty
from toolkit.errors import UnsupportedError

SPARSE = 10
FIELDS = {"r": 3, "alpha": 6.0, "num_sparse": SPARSE, "units": {"o_proj": 12, "down_proj": 1, "mlp.c_proj": 1}}
UNITS = LAYERS * (4 + 96)
EXAMPLE = Example(FIELDS, LAYERS * sum(3 * (i + o) + SPARSE for i, o in LINEARS.values()) + UNITS, is_lora=False)


def layers(model: torch.nn.Module) -> list[DseeLinear]:
    return [m for m in model.modules() if isinstance(m, DseeLinear)]


def sparse(layer: DseeLinear) -> torch.Tensor:
    """S2 as a matrix, one entry at a time."""
    inputs, outputs = layer.sizes
    dense = torch.zeros(outputs, inputs, dtype=torch.float64)
    for place, value in zip(layer.dsee_index["default"].tolist(), layer.dsee_values["default"].tolist(), strict=True):
        dense[place // inputs, place % inputs] += value
    return dense


def effective(layer: DseeLinear) -> torch.Tensor:
    """`W + s U V + S2`, in float32."""
    a, b, scale = layer._pair("default")
    return (layer.base_weight + scale * (b @ a) + sparse(layer).float()).detach()


@pytest.mark.system("dsee")
@pytest.mark.parametrize("make", [tiny.llama, gpt2])
@pytest.mark.parametrize("pruned", [False, True])
def test_is_the_formula_and_its_merged_weight(make, pruned):
    model = attach(make(), "dsee", **FIELDS)
    randomise(model)
    if pruned:
        prune(model, 0.5)
    model = model.double()
    for layer in layers(model):
        x = torch.randn(5, layer.sizes[0], dtype=torch.float64)
        w = layer.base_layer.weight.data if make is tiny.llama else layer.base_layer.weight.data.T
        mask = layer.mask("default") if pruned else torch.ones_like(w)
        u, v = layer.dsee_b["default"].data, layer.dsee_a["default"].data
        kept = w * mask
        if layer.has("default", "coefficients"):
            c = layer.dsee_coefficients["default"].data
            kept = kept * c.repeat_interleave(layer.sizes[0] // len(c))
        weight = kept + 2.0 * u @ v + sparse(layer)
        bias = 0 if layer.base_layer.bias is None else layer.base_layer.bias.data
        # the base's weight is read in float32, which holds it exactly
        torch.testing.assert_close(layer(x).data, x @ weight.T + bias, rtol=1e-10, atol=1e-10)
        close(layer.base_weight + layer.fold("default").weight, weight.float())


@pytest.mark.system("dsee")
def test_nothing_sparse_is_lora_and_no_rank_is_a_sparse_change():
    model = attach(tiny.llama(), "dsee", r=3, alpha=6.0, num_sparse=0)
    randomise(model)
    lora = get_peft_model(tiny.llama(), LoraConfig(r=3, lora_alpha=6, target_modules="all-linear")).eval()
    for mine, other in zip(layers(model), [m for m in lora.modules() if hasattr(m, "lora_A")], strict=True):
        other.lora_A["default"].weight.data = mine.low_rank("default").a.data
        other.lora_B["default"].weight.data = mine.low_rank("default").b.data
    close(logits(model), logits(lora), 1e-6)
    model = attach(tiny.llama(), "dsee", r=0, num_sparse=SPARSE)
    randomise(model)
    base = tiny.llama()
    for layer, other in zip(layers(model), [m for n, m in base.named_modules() if n.endswith("_proj")], strict=True):
        assert layer.fold("default").weight.count_nonzero() == SPARSE
        other.weight.data += sparse(layer).float()
    close(logits(model), logits(base), 1e-6)


@pytest.mark.system("dsee")
def test_support_is_what_the_decomposition_leaves_largest():
    model = attach(tiny.llama(), "dsee", **FIELDS)
    for layer in layers(model)[:7]:
        w = layer.base_weight.double().numpy()
        u, s, v = np.linalg.svd(w)
        rest = np.abs(w - (u[:, :3] * s[:3]) @ v[:3])
        found = set(layer.dsee_index["default"].tolist())
        exact = set(np.argsort(-rest.ravel(), kind="stable")[:SPARSE].tolist())
        assert found == exact
    large = attach(tiny.llama(), "dsee", **(FIELDS | {"support": "magnitude"}))
    expected = np.sort(np.argsort(-np.abs(layers(large)[0].base_weight.numpy().ravel()), kind="stable")[:SPARSE])
    assert layers(large)[0].dsee_index["default"].tolist() == expected.tolist()
    drawn = [attach(tiny.llama(), "dsee", **(FIELDS | {"support": "random", "seed": seed})) for seed in (0, 0, 1)]
    first, again, other = (layers(one)[0].dsee_index["default"] for one in drawn)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert len(first.unique()) == SPARSE


@pytest.mark.system("dsee")
def test_randomised_decomposition_finds_planted_entries(monkeypatch):
    monkeypatch.setattr("toolkit.adapters.methods.dsee._EXACT", 8)
    base = tiny.llama()
    generator = torch.Generator().manual_seed(0)
    weight = base.model.layers[1].mlp.up_proj.weight
    weight.data = torch.randn(96, 3, generator=generator) @ torch.randn(3, 48, generator=generator)
    places = torch.randperm(96 * 48, generator=generator)[:SPARSE].sort().values
    weight.data.view(-1)[places] += 5
    layer = next(m for n, m in attach(base, "dsee", **FIELDS).named_modules() if n.endswith("1.mlp.up_proj"))
    assert torch.equal(layer.dsee_index["default"], places)


@pytest.mark.system("dsee")
@pytest.mark.parametrize("ratio", [0.001, 0.25, 0.5, 0.97])
def test_pruning_removes_exactly_that_many_of_all_weights_together(ratio):
    model = attach(tiny.llama(), "dsee", **FIELDS)
    randomise(model, strength=0.05)
    for index, layer in enumerate(layers(model)):  # so that a ratio per layer would be another one
        layer.base_layer.weight.data *= 1 + index / 10
    scores = np.concatenate([effective(layer).abs().flatten() for layer in layers(model)])
    count = prune(model, ratio)
    assert count == floor(ratio * len(scores))
    removed = np.concatenate([~layer.mask("default").flatten() for layer in layers(model)])
    assert removed.sum() == count
    assert set(np.flatnonzero(removed)) == set(np.argsort(scores, kind="stable")[:count])
    shares = [float(1 - layer.mask("default").float().mean()) for layer in layers(model)]
    assert max(shares) > min(shares)


@pytest.mark.system("dsee")
def test_mask_and_support_stay_through_training_and_the_file(tmp_path):
    model = attach(tiny.llama(), "dsee", **FIELDS)
    randomise(model, strength=0.05)
    prune(model, 0.5)
    kept = {
        name: value for name, value in bits(model).items() if "mask" in name or "index" in name or "base_layer" in name
    }
    optimizer = torch.optim.Adam([v for v in model.parameters() if v.requires_grad], lr=1e-2)
    losses = []
    for _ in range(6):
        optimizer.zero_grad()
        losses.append(model(IDS, labels=IDS).loss)
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    assert all(torch.equal(bits(model)[name], value) for name, value in kept.items())
    loaded = PeftModel.from_pretrained(tiny.llama(), save(model, tmp_path))
    assert torch.equal(logits(loaded), logits(model))
    assert loaded.peft_config["default"].sparsity == 0.5
    for layer in layers(loaded):
        layer.dsee_b["default"].data.zero_()
        layer.dsee_values["default"].data.zero_()
    folded = loaded.merge_and_unload()
    for mine, name in zip(layers(model), [n for n, _ in folded.named_modules() if n.endswith("_proj")], strict=True):
        assert (folded.get_submodule(name).weight[~mine.mask("default")] == 0).all(), "pruned entries stay zero"


@pytest.mark.system("dsee")
def test_merging_a_low_rank_change_gives_up_the_sparsity():
    model = attach(tiny.llama(), "dsee", **FIELDS)
    randomise(model)
    prune(model, 0.5)
    weight = layers(model)[0].base_weight + layers(model)[0].fold("default").weight
    assert (weight == 0).float().mean() < 0.01


@pytest.mark.system("dsee")
def test_head_of_coefficient_zero_can_be_cut_out():
    """What the head computes, from its values on, no longer matters; nor does a unit of the feed-forward network."""
    fields = {"r": 0, "num_sparse": 0, "units": {"o_proj": 12, "down_proj": 1}}
    fields["target_modules"] = ["o_proj", "down_proj"]
    model = attach(tiny.llama(num_key_value_heads=4), "dsee", **fields)
    randomise(model)
    first, mlp = layers(model)[:2]
    first.dsee_coefficients["default"].data[2] = 0
    mlp.dsee_coefficients["default"].data[7] = 0
    expected = logits(model)
    block = model.get_base_model().model.layers[0]
    block.self_attn.v_proj.weight.data[24:36] = 9.0
    block.mlp.up_proj.weight.data[7] = 9.0
    assert torch.equal(logits(model), expected)
    block.self_attn.v_proj.weight.data[12:24] = 9.0
    assert not torch.equal(logits(model), expected)


@pytest.mark.system("dsee")
def test_units_of_the_smallest_coefficients_go():
    model = attach(tiny.llama(), "dsee", **FIELDS)
    randomise(model)
    assert unit_penalty_by_hand(model) == pytest.approx(float(unit_penalty(model).detach()), rel=1e-6)
    count = prune_units(model, 0.25)
    assert count == LAYERS * 4 // 4 + LAYERS * 96 // 4
    for end in ("o_proj", "down_proj"):
        found = [m for n, m in model.named_modules() if isinstance(m, DseeLinear) and n.endswith(end)]
        values = np.concatenate([m.tensor("default", "coefficients").detach().abs() for m in found])
        gone = np.concatenate([m.tensor("default", "kept_units") == 0 for m in found])
        assert set(np.flatnonzero(gone)) == set(np.argsort(values)[: len(values) // 4])
        for layer, units in zip(found, gone.reshape(LAYERS, -1), strict=True):
            kept = layer._pruned("default").detach().reshape(layer.sizes[1], len(units), -1)
            assert (kept[:, units] == 0).all()
            assert (kept[:, ~units] != 0).any(dim=2).all()
    attached = logits(model)
    close(logits(model.merge_and_unload()), attached)


def unit_penalty_by_hand(model) -> float:
    return sum(float(v.detach().abs().sum()) for n, v in model.named_parameters() if "coefficients" in n)


def test_smallest_of_several_tensors_with_ties():
    rng = np.random.default_rng(0)
    for count in (0, 1, 7, 50, 119, 120):
        arrays = [rng.integers(0, 6, size).astype(np.float32) / 3 for size in (50, 1, 69)]
        found = list(smallest([lambda a=a: torch.from_numpy(a) for a in arrays], count))
        flat, chosen = np.concatenate(arrays), np.concatenate(found)
        assert chosen.sum() == count
        assert set(np.flatnonzero(chosen)) == set(np.argsort(flat, kind="stable")[:count])


@pytest.mark.parametrize("count", [1, 7, 8, 9, 64, 1000])
def test_bits_are_packed_as_numpy_does(count):
    bools = torch.rand(count, generator=torch.Generator().manual_seed(count)) < 0.5
    packed = pack_bits(bools)
    assert packed.tolist() == np.packbits(bools.numpy(), bitorder="little").tolist()
    assert torch.equal(unpack_bits(packed, count), bools)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"r": 0, "num_sparse": 0}, "there is one of r"),
        ({"r": -1}, "at least 0"),
        ({"support": "guess"}, "support is one of decomposition, grebsmo, magnitude, random, not 'guess'"),
        ({"sparsity": 1.0}, "below 1"),
    ],
)
def test_wrong_fields(fields, message):
    with pytest.raises(ValueError, match=message):
        DseeConfig(**fields)


def test_what_does_not_fit_says_so():
    with pytest.raises(ValueError, match=r"q_proj: num_sparse 9999 is more than its 2304 weights"):
        attach(tiny.llama(), "dsee", num_sparse=9999)
    with pytest.raises(ValueError, match=r"o_proj: units of 7 do not divide its input of 48"):
        attach(tiny.llama(), "dsee", units={"o_proj": 7})
    model = attach(tiny.llama(), "dsee", r=2)
    with pytest.raises(ValueError, match="no DSEE adapter 'other'"):
        prune(model, 0.5, "other")
    with pytest.raises(ValueError, match="between 0 and 1, got 1"):
        prune(model, 1)
    with pytest.raises(ValueError, match="no module has coefficients"):
        prune_units(model, 0.5)
    with pytest.raises(UnsupportedError, match="cannot be written as LoRA"):
        layers(model)[0].low_rank("default")
    assert all(later > earlier for earlier, later in pairwise(layers(model)[0].dsee_index["default"].tolist()))
    assert config_of("dsee").num_sparse == 64


def test_a_planted_low_rank_and_sparse_sum_is_taken_apart():
    """All planted entries are found, where what a plain decomposition leaves hides a part of them."""
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((60, 3), (3, 40)))
    left = 0.3 * left
    planted = torch.randperm(2400, generator=generator)[:120].sort().values
    matrix = left @ right
    matrix.view(-1)[planted] += 6 * torch.randn(120, generator=generator, dtype=torch.float64).sign()
    smooth, places = low_rank_plus_sparse(matrix, 3, 120, seed=0)
    assert torch.equal(places, planted)
    close(smooth, left @ right, 1e-6)
    u, s, v = torch.linalg.svd(matrix)
    once = (matrix - (u[:, :3] * s[:3]) @ v[:3]).abs().flatten().topk(120).indices.sort().values
    assert not torch.equal(once, planted)
    model = attach(tiny.llama(), "dsee", r=2, num_sparse=9, support="grebsmo")
    layer = next(m for m in model.modules() if isinstance(m, DseeLinear))
    assert torch.equal(layer.tensor("default", "index"), low_rank_plus_sparse(layer.base_weight, 2, 9, seed=0)[1])
