"""`sherl`: redundancy and weights in closed form, what is frozen exactly, and how far the graph reaches."""

from __future__ import annotations

import pytest
import torch

from tests import tiny
from tests.adapters.laws import HIDDEN, IDS, LAYERS, Example, attach, close, logits, randomise
from tests.adapters.side import decoder, kept_bytes, network, taps
from toolkit.adapters.methods.sherl import SherlConfig, redundancy

pytestmark = pytest.mark.system("sherl")

NARROW = HIDDEN // 4
EXAMPLE = Example(
    {},
    (LAYERS - 1) * (HIDDEN * NARROW + NARROW) + NARROW + 1 + NARROW * HIDDEN + HIDDEN + 1,
    folds=False,
    is_lora=False,
)


def late_part(model, state: torch.Tensor, count: int) -> torch.Tensor:
    """Run the last layers of a plain model on a state, and its head."""
    plain, found = model, []
    handle = plain.model.layers[LAYERS - count].register_forward_pre_hook(
        lambda module, args: found.append(1) or (state, *args[1:])
    )
    with torch.no_grad():
        scores = plain(IDS).logits
    handle.remove()
    assert found
    return scores


@pytest.mark.parametrize("late", [1, 2])
def test_early_states_made_one_go_through_the_late_layers(late):
    model = attach(tiny.llama(), "sherl", late=late, gate=0.0)
    randomise(model, strength=0.5)
    side = network(model)
    seen = taps(tiny.llama())
    states = seen.states[: LAYERS - late + 1]
    with torch.no_grad():
        x = [down(states[s]) for down, s in zip(side.downs, side.sources, strict=True)]
        scores = []
        for one in x:
            cosines = [torch.nn.functional.cosine_similarity(one, other, dim=-1).relu() for other in x]
            scores.append(torch.relu(side.score(one * x[-1]))[..., 0] / sum(cosines))
        total = sum(scores)
        merged = sum((s / total.where(total > 0, 1))[..., None] * one for s, one in zip(scores, x, strict=True))
        gate = torch.tanh(side.gate / 0.1)
        expected = side.up(torch.relu(merged)) + gate * states[-1]
        close(side(states), expected)
    close(logits(model), late_part(tiny.llama(), expected, late))


def test_state_itself_gives_the_frozen_output_exactly():
    model = attach(tiny.llama(), "sherl", late=2)
    network(model).forward = lambda states: states[-1]
    assert torch.equal(logits(model), logits(tiny.llama()))


def test_gate():
    """At 0 nothing of the last early state passes by itself; at 1 all of it does, to the bit."""
    model = attach(tiny.llama(), "sherl", gate=0.0)
    side, states = network(model), taps(tiny.llama()).states[:LAYERS]
    with torch.no_grad():
        scaled = [*states[:-1], states[-1]]
        whole = side(scaled)
        side.up.weight.zero_()
        side.up.bias.zero_()
        assert not side(scaled).any()
        assert whole.any()
        side.gate.fill_(1.0)
        assert torch.equal(side(scaled), states[-1])


def test_redundancy_of_orthogonal_and_of_equal_states():
    features = torch.eye(4)[None, :3]
    assert torch.equal(redundancy(features), torch.ones(1, 3))
    twice = torch.cat([features, features[:, :1]], dim=1)
    assert torch.equal(redundancy(twice), torch.tensor([[2.0, 1, 1, 2]]))
    assert torch.equal(redundancy(torch.zeros(1, 2, 4)), torch.ones(1, 2))


def test_a_state_twice_counts_as_often_as_once():
    """Each copy's weight is half, and the sum is what it was."""
    side = network(attach(tiny.llama(), "sherl"))
    side.score.weight.data.abs_()
    side.score.bias.data.fill_(0.1)
    features = torch.eye(NARROW)[None, [0, 1, 2]]
    with torch.no_grad():
        once = side.consolidated(features)
        again = side.consolidated(torch.cat([features[:, :1], features], dim=1))
    close(again, once, 1e-6)


def test_graph_reaches_the_late_layers_alone():
    kept = [kept_bytes(attach(tiny.llama(num_hidden_layers=n), "sherl", layers=[0, 1]).train()) for n in (4, 6, 9)]
    assert kept[0] == kept[1] == kept[2]
    more = kept_bytes(attach(tiny.llama(num_hidden_layers=9), "sherl", layers=[0, 1], late=2).train())
    assert more > kept[0]
    model = attach(tiny.llama(), "sherl").train()
    output = decoder(model)(input_ids=IDS).last_hidden_state
    assert output.requires_grad
    assert not any(v.requires_grad for n, v in model.named_parameters() if "sherl_" not in n)


def test_all_layers_late_is_a_change_of_the_embedding():
    model = attach(tiny.llama(), "sherl", late=LAYERS)
    assert torch.equal(logits(model), logits(tiny.llama()))
    randomise(model)
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(tiny.llama()))
    with torch.no_grad():
        changed = network(model)(taps(tiny.llama()).states[:1])
    close(logits(model), tiny.llama()(inputs_embeds=changed).logits.detach())


def test_greedy_decoding_with_a_cache():
    model = attach(tiny.llama(), "sherl")
    randomise(model)
    with torch.no_grad():
        out = model.generate(input_ids=IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=5, do_sample=False)
    ids = IDS
    for _ in range(out.shape[1] - IDS.shape[1]):
        ids = torch.cat([ids, logits(model, ids)[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(out, ids)


def test_mistakes():
    with pytest.raises(ValueError, match="late 4 of 3 layers"):
        attach(tiny.llama(), "sherl", late=4)
    with pytest.raises(ValueError, match="at least 1"):
        SherlConfig(late=0)
