"""`mos` against PEFT's LoRA, against shards applied one at a time, and against the paper's count."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model

from tests import tiny
from tests.adapters.laws import LAYERS, LINEARS, Example, attach, config_of, grads, logits, randomise, save
from toolkit.adapters.methods.mos import MosConfig, MosLinear
from toolkit.checkpoints.reader import open_checkpoint

FIELDS = {"r": 4, "alpha": 6.0, "equivalent_rank": 2, "private_rank": 1, "shards": 4}
EXAMPLE = Example(FIELDS, count=sum(2 * LAYERS * (i + o) for i, o in LINEARS.values()))
PLAIN = {"r": 3, "equivalent_rank": 3, "private_rank": 3, "shards": 1, "alpha": 6.0}


def layers(model: torch.nn.Module, end: str = "") -> list[MosLinear]:
    return [m for name, m in model.named_modules() if isinstance(m, MosLinear) and name.endswith(end)]


@pytest.mark.system("mos")
def test_all_private_whole_vectors_are_plain_lora():
    model = attach(tiny.llama(), "mos", **PLAIN)
    randomise(model)
    lora = get_peft_model(tiny.llama(), LoraConfig(r=3, lora_alpha=6, target_modules="all-linear")).eval()
    theirs = [m for m in lora.modules() if hasattr(m, "lora_A")]
    ours = layers(model)
    assert len(ours) == len(theirs) == LAYERS * len(LINEARS)
    for mine, other in zip(ours, theirs, strict=True):
        a, b = mine.factors("default")
        other.lora_A["default"].weight.data, other.lora_B["default"].weight.data = a.detach(), b.detach().contiguous()
    torch.testing.assert_close(logits(model), logits(lora), rtol=0, atol=2e-6 * float(logits(lora).abs().max()))
    pools, factors = grads(model), grads(lora)
    for end in LINEARS:
        for pool, factor in (("pool_a", "lora_A"), ("pool_b", "lora_B")):
            mine = next(value for name, value in pools.items() if f"{end}.mos_{pool}" in name)
            rows = [
                value if pool == "pool_a" else value.T for name, value in factors.items() if f"{end}.{factor}" in name
            ]
            torch.testing.assert_close(mine, torch.cat(rows), rtol=1e-4, atol=1e-5)


@pytest.mark.system("mos")
def test_shards_applied_one_at_a_time():
    """A piece of a vector is the shard that its index names; B A x is the sum over ranks of both pieces' products."""
    model = attach(tiny.llama(), "mos", **FIELDS).double()
    randomise(model)
    layer = layers(model, "up_proj")[1]
    holder = layers(model, "up_proj")[0]
    (inputs, outputs), size = layer.sizes, FIELDS["shards"]
    x = torch.randn(inputs, dtype=torch.float64)
    expected = torch.zeros(outputs, dtype=torch.float64)
    for rank in range(FIELDS["r"]):
        inner = torch.zeros((), dtype=torch.float64)
        for piece in range(size):
            row = layer.mos_index_a["default"][rank * size + piece]
            part = x[piece * inputs // size : (piece + 1) * inputs // size]
            inner = inner + (holder.mos_pool_a["default"][row] * part).sum()
        for piece in range(size):
            row = layer.mos_index_b["default"][rank * size + piece]
            expected[piece * outputs // size : (piece + 1) * outputs // size] += (
                holder.mos_pool_b["default"][row] * inner
            )
    got = layer.change("default", x, expected)
    torch.testing.assert_close(got, expected * FIELDS["alpha"] / FIELDS["r"], rtol=1e-12, atol=1e-12)


@pytest.mark.system("mos")
def test_count_depends_on_the_equivalent_rank_alone():
    for fields in ({}, {"r": 2}, {"r": 6, "private_rank": 0, "shards": 2}, {"shards": 8}):
        model = attach(tiny.llama(), "mos", **(FIELDS | fields))
        assert sum(v.numel() for v in model.parameters() if v.requires_grad) == EXAMPLE.count


@pytest.mark.system("mos")
def test_rank_is_higher_than_the_parameters_pay_for():
    model = attach(tiny.llama(), "mos", **FIELDS)
    randomise(model)
    for layer in layers(model):
        change = layer.fold("default").weight.double()
        assert torch.linalg.matrix_rank(change, rtol=1e-5) == 4 > FIELDS["equivalent_rank"]


@pytest.mark.system("mos")
def test_gradient_of_a_shared_shard_is_the_sum_over_its_uses():
    model = attach(tiny.llama(), "mos", **FIELDS)
    randomise(model)
    seen: dict[MosLinear, tuple[torch.Tensor, torch.Tensor]] = {}
    original = MosLinear.factors

    def spied(self, adapter):
        a, b = original(self, adapter)
        a.retain_grad(), b.retain_grad()
        seen[self] = a, b
        return a, b

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MosLinear, "factors", spied)
        found = grads(model)
    for end, (inputs, _) in LINEARS.items():
        expected = torch.zeros(2 * LAYERS * 4, inputs // 4)
        for layer in layers(model, end):
            pieces = seen[layer][0].grad.reshape(-1, inputs // 4)
            for row, piece in zip(layer.mos_index_a["default"].tolist(), pieces, strict=True):
                expected[row] += piece
        got = next(value for name, value in found.items() if f"{end}.mos_pool_a" in name)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.system("mos")
def test_indices_are_drawn_as_the_paper_says():
    model = attach(tiny.llama(), "mos", **(FIELDS | {"r": 3}))
    for end in LINEARS:
        found = layers(model, end)
        public, private = LAYERS * 4, []
        for layer in found:
            for index in (layer.mos_index_a["default"], layer.mos_index_b["default"]):
                assert len(index) == len(index.unique()) == 3 * 4
                assert (index[:8] < public).all()
                assert (index[8:] >= public).all()
            a, b = layer.mos_index_a["default"], layer.mos_index_b["default"]
            assert not torch.equal(a[:8], b[:8]), "A and B are drawn apart"
            assert torch.equal(a[8:], b[8:])
            private += a[8:].tolist()
        assert sorted(private) == list(range(public, 2 * public)), "every private shard has one owner"
        assert not torch.equal(found[0].mos_index_a["default"][:8], found[1].mos_index_a["default"][:8])


@pytest.mark.system("mos")
def test_private_shards_get_no_gradient_from_other_layers():
    model = attach(tiny.llama(), "mos", **FIELDS)
    randomise(model)
    first, second, _ = layers(model, "q_proj")
    x = torch.randn(3, 48)
    second.change("default", x, x).square().sum().backward()
    got = first.mos_pool_a["default"].grad
    own, other = (layer.mos_index_a["default"][-4:] for layer in (second, first))
    assert (got[own] != 0).any(dim=1).all()
    assert (got[other] == 0).all()


@pytest.mark.system("mos")
def test_start_of_the_pools():
    model = attach(tiny.llama(), "mos", **FIELDS)
    for name, value in model.named_parameters():
        if "pool_b" in name:
            assert (value == 0).all()
        if "down_proj.mos_pool_a" in name:
            bound = 96**-0.5  # of the whole vector, not of the 24 entries of a shard
            assert bound * 0.9 < value.abs().max() <= bound


@pytest.mark.system("mos")
def test_checkpoint_holds_each_pool_once_and_the_indices(tmp_path):
    model = attach(tiny.llama(), "mos", **FIELDS)
    randomise(model)
    for layer in layers(model):
        layer.mos_index_a["default"] = layer.mos_index_a["default"].flip(0)
    from peft import PeftModel

    save(model, tmp_path)
    with open_checkpoint(tmp_path / "adapter_model.safetensors") as stored:
        pools = [name for name in stored.tensors if "pool" in name]
        assert len(pools) == 2 * len(LINEARS)
        assert len(stored.tensors) == len(pools) + 2 * LAYERS * len(LINEARS)
    loaded = PeftModel.from_pretrained(tiny.llama(), tmp_path)
    assert torch.equal(logits(loaded), logits(model)), "indices are read, not drawn again"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"private_rank": 2, "r": 4}, "every shard is private"),
        ({"private_rank": 3}, "private_rank lies between"),
        ({"shards": 0}, "at least 1"),
        ({"dropout": 1.0}, "dropout"),
    ],
)
def test_wrong_fields(fields, message):
    with pytest.raises(ValueError, match=message):
        MosConfig(**(FIELDS | fields))


def test_sizes_that_do_not_fit_name_the_module():
    with pytest.raises(ValueError, match=r"model\.layers\.0\.self_attn\.q_proj: 5 shards do not divide its sizes 48"):
        attach(tiny.llama(), "mos", **(FIELDS | {"shards": 5}))
    with pytest.raises(ValueError, match=r"q_proj: r needs 28 shared shards of 12"):
        attach(tiny.llama(), "mos", **(FIELDS | {"r": 8}))


def test_only_linears():
    with pytest.raises(TypeError, match=r"model\.embed_tokens: mos adapts linear layers, not Embedding"):
        attach(tiny.llama(), "mos", **FIELDS, target_modules=["embed_tokens"])


def test_dropout_is_for_training_alone():
    model = attach(tiny.llama(), "mos", **FIELDS, dropout=0.5)
    randomise(model)
    still = logits(model)
    assert torch.equal(logits(model), still)
    assert not torch.equal(logits(model.train()), still)


def test_pools_are_counted_over_the_layers_that_are_adapted():
    model = attach(tiny.llama(), "mos", **(FIELDS | {"r": 2}), layers_to_transform=[0, 2])
    assert len(layers(model)) == 2 * len(LINEARS)
    assert sum(v.numel() for v in model.parameters() if v.requires_grad) == EXAMPLE.count * 2 // 3
    assert config_of("mos").r == 8
