"""`unipt` written out token by token, its limits, and what it keeps for the backward pass."""

from __future__ import annotations

import copy

import pytest
import torch

from tests import tiny
from tests.adapters.laws import HIDDEN, IDS, LAYERS, Example, attach, close, gpt2, logits, randomise
from tests.adapters.side import kept_bytes, network, taps
from toolkit.adapters.methods.unipt import UniptConfig, interaction

pytestmark = pytest.mark.system("unipt")

NARROW = HIDDEN // 4
DOWN = HIDDEN * NARROW + NARROW + 2 * NARROW
EXAMPLE = Example(
    {}, LAYERS * DOWN + NARROW + NARROW * NARROW + NARROW + NARROW * HIDDEN + HIDDEN, folds=False, is_lora=False
)
"""Two layers and the last have a projection and a norm each; then gate, `proj` and `up`."""


def adapted(make=tiny.llama, strength: float = 0.5, **fields):
    model = attach(make(), "unipt", **fields)
    randomise(model, strength=strength)
    return model


def test_is_the_formula_token_by_token():
    model = adapted().double()
    side, seen = network(model), taps(tiny.llama().double())
    with torch.no_grad():
        got = side(seen)
        anchor = side.anchor(seen.states[-1])
        targets = [down(seen.states[k + 1]) for k, down in enumerate(side.downs)]
        for b in range(2):
            for t in range(8):
                scores = torch.stack([(anchor[b, t] * target[b, t]) @ side.gate.weight[0] for target in targets])
                merged = torch.zeros(NARROW, dtype=torch.float64)
                for share, target in zip(scores.softmax(0), targets, strict=True):
                    products = [max(float(anchor[b, t] @ target[b, u]), 0.0) for u in range(t + 1)]
                    seen_by = sum(w * target[b, u] for u, w in enumerate(products))
                    total = sum(products)
                    merged += share * (target[b, t] + (seen_by / total if total else 0))
                expected = side.up(torch.relu(anchor[b, t] + side.proj(merged)))
                torch.testing.assert_close(got[b, t], expected, rtol=1e-10, atol=1e-10)


def test_confidences_add_up_to_one_and_one_layer_has_all():
    side = network(adapted())
    anchor = torch.randn(2, 5, NARROW)
    targets = [torch.randn(2, 5, NARROW) for _ in range(3)]
    close(side.confidences(anchor, targets).sum(0), torch.ones(2, 5, 1))
    assert torch.equal(side.confidences(anchor, targets[:1]), torch.ones(1, 2, 5, 1))


def test_order_of_the_layers_does_not_matter():
    side = network(adapted())
    seen = taps(tiny.llama())
    other = copy.deepcopy(side)
    other.sources, other.downs = side.sources[::-1], torch.nn.ModuleList(list(side.downs)[::-1])
    with torch.no_grad():
        close(other(seen), side(seen), 1e-6)


def test_nothing_positive_leaves_the_states_as_they_are():
    anchor, target = torch.rand(1, 3, 4), -torch.rand(1, 3, 4)
    mask = torch.ones(1, 3, 3, dtype=torch.bool).tril()
    assert torch.equal(interaction(anchor, target, mask), torch.zeros(1, 3, 4))
    close(interaction(anchor, -target, mask)[:, 0], -target[:, 0])


@pytest.mark.parametrize("make", [tiny.llama, gpt2])
def test_future_tokens_change_nothing_earlier(make):
    model = adapted(make)
    other = IDS.clone()
    other[:, 5:] += 1
    close(logits(model, other)[:, :5], logits(model)[:, :5], 1e-6)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("make", [tiny.llama, gpt2])
def test_padding_and_packing_see_what_the_mask_says(make, attention):
    base = make()
    base.set_attn_implementation(attention)
    model = attach(base, "unipt")
    randomise(model, strength=0.5)
    expected = logits(model, IDS[:1, :5])
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), IDS[:1, :5]], dim=1)
    mask = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1]])
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    close(logits(model, padded, attention_mask=mask, position_ids=positions)[:, 3:], expected)
    packed = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2]])
    if make is tiny.llama:
        close(logits(model, IDS[:1], position_ids=packed, use_cache=False)[:, 5:], logits(model, IDS[:1, 5:]))


def test_keeps_less_than_an_adapter_inside():
    side = kept_bytes(attach(tiny.llama(), "unipt").train())
    inside = kept_bytes(attach(tiny.llama(), "lora", r=4, target_modules="all-linear").train())
    assert side < inside / 3


@pytest.mark.parametrize("make", [tiny.llama, gpt2])
def test_greedy_decoding_with_a_cache(make):
    model = adapted(make)
    with torch.no_grad():
        out = model.generate(input_ids=IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=5, do_sample=False)
    ids = IDS
    for _ in range(out.shape[1] - IDS.shape[1]):
        ids = torch.cat([ids, logits(model, ids)[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(out, ids)


def test_mistakes():
    with pytest.raises(ValueError, match="reduction 5 does not divide 48"):
        attach(tiny.llama(), "unipt", reduction=5)
    with pytest.raises(ValueError, match="at least 1"):
        UniptConfig(reduction=0)
