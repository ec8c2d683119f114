"""`lst`: its arithmetic written out, what it keeps for the backward pass, and the memory that the paper promises."""

from __future__ import annotations

import pytest
import torch

from tests import tiny
from tests.adapters.laws import HIDDEN, IDS, INNER, LAYERS, Example, attach, close, gpt2, grads, logits, randomise
from tests.adapters.side import decoder, gradient_bytes, kept_bytes, network, taps
from toolkit.adapters.methods.lst import LstConfig

pytestmark = pytest.mark.system("lst")

REDUCTION, NARROW = 4, HIDDEN // 4
HEAD = HIDDEN // 4
BLOCK = 4 * NARROW * HEAD + 3 * NARROW * (INNER // REDUCTION) + 2 * NARROW
"""One query head and one key head of the decoder's size, a feed-forward network, two norms."""

EXAMPLE = Example(
    {"reduction": REDUCTION},
    (LAYERS + 1) * HIDDEN * NARROW + LAYERS * (1 + BLOCK) + NARROW + NARROW * HIDDEN,
    folds=False,
    is_lora=False,
)


def ladder(side, seen, gates) -> torch.Tensor:
    """The formula of the paper, with the side layers as they are."""
    state = side.downs[0](seen.states[0])
    for k, source in enumerate(side.sources):
        state = gates[k] * side.downs[k + 1](seen.states[source + 1]) + (1 - gates[k]) * state
        state = side.blocks[k](state, **seen.calls[source].kwargs)
    return side.up(side.norm(state))


@pytest.mark.parametrize("layers", [None, [0, -1]])
def test_is_the_ladder_written_out(layers):
    model = attach(tiny.llama(), "lst", reduction=REDUCTION, layers=layers)
    randomise(model)
    side, plain = network(model), tiny.llama()
    assert side.sources == ([0, 1, 2] if layers is None else [0, 2])
    with torch.no_grad():
        added = ladder(side, taps(plain), torch.sigmoid(side.alphas / 0.1))
        expected = plain.lm_head(plain.model(IDS).last_hidden_state + added)
    close(logits(model), expected)


@pytest.mark.parametrize(("alpha", "gate"), [(50.0, 1.0), (-50.0, 0.0)])
def test_gates_at_their_ends(alpha, gate):
    """Open, a side layer sees the decoder alone; closed, the side layers are a chain on the embedding."""
    model = attach(tiny.llama(), "lst", reduction=REDUCTION)
    randomise(model)
    side = network(model)
    side.alphas.data.fill_(alpha)
    seen = taps(tiny.llama())
    with torch.no_grad():
        assert torch.equal(side.gates(), torch.full((LAYERS,), gate))
        close(side(seen), ladder(side, seen, [gate] * LAYERS))
        for source in range(1, LAYERS + 1):
            seen.states[source] = torch.randn_like(seen.states[source])
        if gate == 0:
            close(side(seen), ladder(side, taps(tiny.llama()), [0.0] * LAYERS))


def test_without_residual_the_side_network_alone_predicts():
    model = attach(tiny.llama(), "lst", reduction=REDUCTION, residual=False)
    randomise(model)
    with torch.no_grad():
        expected = tiny.llama().lm_head(network(model)(taps(tiny.llama())))
    close(logits(model), expected)


def test_cached_states_give_the_same_gradients():
    """Training on states that were kept from before is ordinary training: nothing else of the decoder matters."""
    model = attach(tiny.llama(), "lst", reduction=REDUCTION)
    randomise(model)
    expected = grads(model)
    side, plain = network(model), tiny.llama()
    seen = taps(plain)
    with torch.no_grad():
        last = plain.model(IDS).last_hidden_state
    model.zero_grad()
    scores = plain.lm_head(last + side(seen))
    torch.nn.functional.cross_entropy(scores[:, :-1].flatten(0, 1), IDS[:, 1:].flatten()).backward()
    for name, value in side.named_parameters():
        close(value.grad, expected[f"base_model.model.model.lst_network.default.{name}"])


def long_ids(length: int = 64) -> torch.Tensor:
    return torch.arange(2 * length).reshape(2, length) % 250


@pytest.mark.parametrize("pruned", [True, False])
def test_saves_the_memory_that_the_paper_promises(pruned):
    """80% of full fine-tuning's activations and gradients, where it has 69%: reduction 8, eight layers, no head."""
    sizes = {
        "hidden_size": 128,
        "intermediate_size": 344,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
    }
    full = tiny.llama(**sizes).train()
    lst = attach(tiny.llama(**sizes), "lst", reduction=8, pruned=pruned).train()
    lora = attach(tiny.llama(**sizes), "lora", r=8, target_modules="all-linear").train()
    totals = {
        n: kept_bytes(m, long_ids()) + gradient_bytes(m) for n, m in (("full", full), ("lst", lst), ("lora", lora))
    }
    assert 1 - totals["lst"] / totals["full"] >= 0.8
    assert 1 - totals["lora"] / totals["full"] < 0.4, "an adapter inside does not"


def test_what_is_kept_depends_on_taps_alone():
    def bytes_of(layers=None, **sizes):
        return kept_bytes(attach(tiny.llama(**sizes), "lst", reduction=4, layers=layers, pruned=False).train())

    plain = bytes_of([1])
    assert bytes_of([1], num_hidden_layers=6) == plain
    two, three = bytes_of([1, 2], num_hidden_layers=4), bytes_of([1, 2, 3], num_hidden_layers=4)
    assert three - two == two - bytes_of([1], num_hidden_layers=4)
    wide = attach(tiny.llama(), "lst", reduction=4, layers=[1])
    # The decoder's own feed-forward width does not matter; that of the side layer is what it would be.
    for layer in decoder(wide).layers:
        layer.mlp = tiny.llama(intermediate_size=960).model.layers[0].mlp
    assert kept_bytes(wide.train()) == plain


@pytest.mark.parametrize("make", [tiny.llama, gpt2])
def test_start_is_a_part_of_the_decoder(make):
    """The first heads and units of every matrix, the same in all: what a side layer computes of them is theirs."""
    model = attach(make(), "lst", reduction=4)
    block, layer = network(model).blocks[1], decoder(make())
    layer = (layer.layers if make is tiny.llama else layer.h)[1]
    if make is tiny.llama:
        assert torch.equal(block.self_attn.q_proj.weight, layer.self_attn.q_proj.weight[:12, :12])
        assert torch.equal(block.self_attn.o_proj.weight, layer.self_attn.o_proj.weight[:12, :12])
        units = torch.cat([torch.arange(12), torch.arange(48, 60)])  # 96 are twice the hidden size
        assert torch.equal(block.mlp.down_proj.weight, layer.mlp.down_proj.weight[:12, units])
        assert torch.equal(block.mlp.up_proj.weight, layer.mlp.up_proj.weight[units, :12])
        assert torch.equal(block.input_layernorm.weight, layer.input_layernorm.weight[:12])
    else:
        wide = layer.attn.c_attn.weight[:12]
        assert torch.equal(block.attn.c_attn.weight, torch.cat([wide[:, i * 48 : i * 48 + 12] for i in range(3)], 1))
        up, down = layer.mlp.c_fc.weight, layer.mlp.c_proj.weight
        kept = torch.cat([torch.arange(i * 48, i * 48 + 12) for i in range(4)])
        assert torch.equal(block.mlp.c_fc.weight, up[:12, kept])
        assert torch.equal(block.mlp.c_proj.weight, down[kept, :12])


@pytest.mark.parametrize("make", [tiny.llama, gpt2])
def test_greedy_decoding_with_a_cache(make):
    model = attach(make(), "lst", reduction=4)
    randomise(model)
    with torch.no_grad():
        out = model.generate(input_ids=IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=5, do_sample=False)
    ids = IDS
    for _ in range(out.shape[1] - IDS.shape[1]):
        ids = torch.cat([ids, logits(model, ids)[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(out, ids)


def test_two_ladders_share_a_cache():
    from tests.adapters.laws import config_of

    model = attach(tiny.llama(), "lst", reduction=4)
    model.add_adapter("other", config_of("lst", reduction=2, layers=[1]))
    randomise(model)
    randomise(model, seed=4, adapter="other")
    model.base_model.set_adapter(["default", "other"])
    with torch.no_grad():
        start = model(IDS[:, :5], use_cache=True)
        rest = model(IDS[:, 5:], past_key_values=start.past_key_values).logits
    close(torch.cat([start.logits, rest], dim=1), logits(model))


def test_mistakes():
    with pytest.raises(ValueError, match="reduction 5 does not divide the hidden size 48"):
        attach(tiny.llama(), "lst", reduction=5)
    with pytest.raises(ValueError, match="the decoder has the layers 0 to 2"):
        attach(tiny.llama(), "lst", reduction=4, layers=[3])
    with pytest.raises(ValueError, match="temperature above 0"):
        LstConfig(temperature=0)
