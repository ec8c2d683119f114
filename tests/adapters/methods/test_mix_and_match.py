"""`mix_and_match`: its prefix against the gated sum of the paper, and against a cache that holds it from the start."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

from tests import tiny
from tests.adapters.laws import HIDDEN, IDS, KEYS, LAYERS, Example, attach, close, gpt2, logits, randomise
from tests.adapters.methods.test_bottleneck import hooked
from toolkit.adapters.methods._prefix import PrefixedCache
from toolkit.adapters.methods._unified import UnifiedLayer
from toolkit.errors import UnsupportedError

PREFIX, SIZE = 3, 6
FIELDS = {"prefix": PREFIX, "size": SIZE, "scale": 2.0}
EXAMPLE = Example(
    FIELDS,
    LAYERS * (2 * PREFIX * KEYS + 2 * HIDDEN * SIZE + SIZE + HIDDEN),
    starts_at_base=False,
    folds=False,
    is_lora=False,
)


def attentions(model: torch.nn.Module) -> list[UnifiedLayer]:
    return [m for name, m in model.named_modules() if isinstance(m, UnifiedLayer) and name.endswith("attn")]


def prefixed(model: torch.nn.Module, rows: int) -> DynamicCache:
    """Return a cache that holds the prefixes as if they had been there first."""
    cache = DynamicCache()
    for index, layer in enumerate(attentions(model)):
        keys, values = (layer.tensor("default", f"prefix_{kind}").data.transpose(0, 1) for kind in ("keys", "values"))
        cache.update(keys[None].repeat(rows, 1, 1, 1), values[None].repeat(rows, 1, 1, 1), index)
    return cache


@pytest.mark.system("unified_peft")
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("make", [tiny.llama, gpt2])
@pytest.mark.parametrize("padded", [False, True])
def test_is_a_prefix_in_the_cache_and_a_bottleneck_beside_the_ffn(make, attention, padded):
    base = make()
    base.set_attn_implementation(attention)
    model = attach(base, "mix_and_match", **FIELDS)
    randomise(model, strength=0.5)
    plain = make()
    plain.set_attn_implementation(attention)
    for name, layer in model.get_base_model().named_modules():
        if isinstance(layer, UnifiedLayer) and name.endswith("mlp"):
            from tests.adapters.methods.test_bottleneck import hook

            plain.get_submodule(name).register_forward_hook(
                hook(layer, torch.relu, 2.0, parallel=True), with_kwargs=True
            )
    mask = torch.ones_like(IDS)
    positions = torch.arange(IDS.shape[1]).expand_as(IDS)
    if padded:
        mask[0, :3] = 0
        positions = (mask.cumsum(1) - 1).clamp(min=0)
    seen = torch.cat([torch.ones(2, PREFIX, dtype=torch.long), mask], dim=1)
    expected = logits(plain, past_key_values=prefixed(model, 2), attention_mask=seen, position_ids=positions)
    got = logits(model, attention_mask=mask, position_ids=positions)
    close(got[mask.bool()], expected[mask.bool()])
    if not padded:
        assert torch.equal(logits(model), got), "no mask is a mask of ones"
    assert (got - logits(make())).abs().max() > 0.1


@pytest.mark.system("unified_peft")
def test_prefix_is_a_gated_sum(monkeypatch):
    """`(1 - l) softmax(q K^T) V + l softmax(q P_k^T) P_v`, with `l` the softmax's mass on the prefix."""
    from transformers.models.llama import modeling_llama

    plain = tiny.llama().double()
    plain.set_attn_implementation("eager")
    caught = []
    eager = modeling_llama.eager_attention_forward

    def catch(module, query, key, value, mask, scaling, **options):
        caught.append((query, key, value, scaling))
        return eager(module, query, key, value, mask, scaling, **options)

    monkeypatch.setattr(modeling_llama, "eager_attention_forward", catch)
    logits(plain)
    q, k, v, scaling = caught[0]
    monkeypatch.undo()
    plain.set_attn_implementation("sdpa")  # eager softmax is float32
    model = attach(plain, "mix_and_match", **FIELDS).double()
    randomise(model, strength=0.5)
    layer = attentions(model)[0]
    prefix_k, prefix_v = (
        layer.tensor("default", f"prefix_{kind}").data.transpose(0, 1).repeat_interleave(2, dim=0)
        for kind in ("keys", "values")
    )
    k, v = (tensor.repeat_interleave(2, dim=1) for tensor in (k, v))
    scores = (q @ k.transpose(2, 3) * scaling).masked_fill(torch.ones(8, 8).triu(1).bool(), -torch.inf)
    prefix_scores = q @ prefix_k.transpose(1, 2) * scaling
    mass = torch.cat([prefix_scores, scores], dim=-1).softmax(-1)[..., :PREFIX].sum(-1, keepdim=True)
    gated = (1 - mass) * (scores.softmax(-1) @ v) + mass * (prefix_scores.softmax(-1) @ prefix_v)
    expected = layer.base_layer.o_proj(gated.transpose(1, 2).reshape(2, 8, HIDDEN))
    outputs = []
    layer.register_forward_hook(lambda module, args, output: outputs.append(output[0]))
    logits(model)
    torch.testing.assert_close(outputs[0], expected, rtol=1e-12, atol=1e-12)
    assert 0.05 < mass.mean() < 0.95


@pytest.mark.system("unified_peft")
def test_greedy_decoding_with_a_cache():
    model = attach(tiny.llama(), "mix_and_match", **FIELDS)
    randomise(model)
    with torch.no_grad():
        out = model.generate(input_ids=IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=6, do_sample=False)
    ids = IDS
    for _ in range(out.shape[1] - IDS.shape[1]):
        ids = torch.cat([ids, logits(model, ids)[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(out, ids)


def test_future_tokens_change_nothing_earlier():
    model = attach(tiny.llama(), "mix_and_match", **FIELDS)
    randomise(model)
    other = IDS.clone()
    other[:, 5:] += 1
    assert torch.equal(logits(model)[:, :5], logits(model, other)[:, :5])


def test_masks_of_another_kind_are_refused():
    from toolkit.adapters.methods._prefix import prefixed_mask

    attention = tiny.llama().model.layers[0].self_attn
    with pytest.raises(UnsupportedError, match="prefixes do not work with attention 'sdpa'; take sdpa"):
        prefixed_mask(object(), 2, 4, attention)
    assert PrefixedCache(None, torch.zeros(1, 2, 3), torch.zeros(1, 2, 3)).cache is None
    assert hooked(tiny.llama(), attach(tiny.llama(), "bottleneck", size=2), torch.relu)[1] == LAYERS


def test_packed_documents_each_see_the_prefix_and_not_each_other():
    model = attach(tiny.llama(), "mix_and_match", **FIELDS)
    randomise(model)
    positions = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2]])
    packed = logits(model, IDS[:1], position_ids=positions, use_cache=False)
    close(packed[:, :5], logits(model, IDS[:1, :5]))
    close(packed[:, 5:], logits(model, IDS[:1, 5:]))
