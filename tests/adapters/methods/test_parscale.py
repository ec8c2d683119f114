"""`parscale` against separate forward passes with each prefix in the cache, and its router's limits."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

from tests import tiny
from tests.adapters.laws import HIDDEN, IDS, KEYS, LAYERS, Example, attach, close, config_of, gpt2, logits, randomise
from tests.adapters.side import decoder
from toolkit.adapters.methods.parscale import ParscaleConfig

pytestmark = pytest.mark.system("parscale")

STREAMS, PREFIX = 3, 5
FIELDS = {"streams": STREAMS, "prefix": PREFIX}
EXAMPLE = Example(
    FIELDS,
    LAYERS * 2 * STREAMS * PREFIX * KEYS + STREAMS * HIDDEN * HIDDEN + HIDDEN + HIDDEN * STREAMS + STREAMS,
    starts_at_base=False,
    folds=False,
    is_lora=False,
)


def adapted(make=tiny.llama, **fields):
    model = attach(make(), "parscale", **(FIELDS | fields))
    randomise(model, strength=0.3)
    return model


def stream(model, make, p: int) -> torch.Tensor:
    """Return the last hidden states of a plain decoder with one stream's prefix in its cache, positions from 0."""
    layer, cache = decoder(model), DynamicCache()
    for index in range(LAYERS):
        keys, values = (layer.tensor("default", f"prefix_{kind}").data[index, p] for kind in ("keys", "values"))
        cache.update(keys[None].repeat(2, 1, 1, 1), values[None].repeat(2, 1, 1, 1), index)
    mask = torch.ones(2, PREFIX + IDS.shape[1], dtype=torch.long)
    positions = torch.arange(IDS.shape[1]).expand_as(IDS)
    with torch.no_grad():
        found = decoder(make())(input_ids=IDS, past_key_values=cache, attention_mask=mask, position_ids=positions)
    return found.last_hidden_state


def last(model, **options) -> torch.Tensor:
    with torch.no_grad():
        return decoder(model)(input_ids=IDS, **options).last_hidden_state


@pytest.mark.parametrize("make", [tiny.llama, gpt2])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_is_a_weighted_sum_of_separate_passes(make, attention):
    model = adapted(make)
    model.get_base_model().set_attn_implementation(attention)
    streams = [stream(model, make, p) for p in range(STREAMS)]
    layer = decoder(model)
    w1, b1, w2, b2 = (layer.tensor("default", n).data for n in ("mix_in", "mix_in_bias", "mix_out", "mix_out_bias"))
    inner = torch.nn.functional.silu(torch.cat(streams, dim=-1) @ w1.T + b1)
    shares = torch.softmax(inner @ w2.T + b2, dim=-1) * 0.9 + 0.1 / STREAMS
    close(shares.sum(-1), torch.ones(2, 8))
    close(last(model), sum(shares[..., p, None] * streams[p] for p in range(STREAMS)))


def test_smoothed_weights_add_up_to_one_and_have_a_floor():
    model = adapted(smoothing=0.3)
    layer = decoder(model)
    layer.tensor("default", "mix_out_bias").data[0] = 100
    with torch.no_grad():
        weights = layer.weights("default", torch.randn(2, 5, STREAMS, HIDDEN))
    close(weights.sum(-1), torch.ones(2, 5))
    close(weights, torch.tensor([0.8, 0.1, 0.1]).expand(2, 5, 3))


def test_equal_prefixes_are_one_stream_whatever_the_router():
    model = adapted()
    for kind in ("keys", "values"):
        value = decoder(model).tensor("default", f"prefix_{kind}")
        value.data = value.data[:, :1].expand_as(value).clone()
    close(last(model), stream(model, tiny.llama, 0))


def test_router_that_is_sure_takes_that_stream():
    model = adapted(smoothing=0.0)
    for p in range(STREAMS):
        bias = decoder(model).tensor("default", "mix_out_bias")
        bias.data = torch.full_like(bias, -1e4)
        bias.data[p] = 1e4
        close(last(model), stream(model, tiny.llama, p))


@pytest.mark.parametrize("make", [tiny.llama, gpt2])
def test_one_stream_without_a_prefix_is_the_base(make):
    model = attach(make(), "parscale", streams=1, prefix=0)
    randomise(model)
    assert torch.equal(logits(model), logits(make()))


@pytest.mark.parametrize("make", [tiny.llama, gpt2])
@pytest.mark.parametrize("beams", [1, 3])
def test_decoding_with_a_cache_is_recomputing(make, beams):
    """With beams, rows are reordered, and the streams of a row stay together."""
    model = adapted(make)
    options = {"max_new_tokens": 5, "do_sample": False, "num_beams": beams, "attention_mask": torch.ones_like(IDS)}
    cached = model.generate(input_ids=IDS, **options)
    assert torch.equal(cached, model.generate(input_ids=IDS, use_cache=False, **options))


def test_rows_of_a_cache_can_be_reordered():
    model = adapted()
    with torch.no_grad():
        start = model(IDS[:, :5], use_cache=True)
        assert len(start.past_key_values.layers[0].keys) == 2
        start.past_key_values.reorder_cache(torch.tensor([1, 0]))
        rest = model(IDS[[1, 0], 5:], past_key_values=start.past_key_values).logits
    close(rest, logits(model)[[1, 0], 5:])


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_padding(attention):
    model = adapted()
    model.get_base_model().set_attn_implementation(attention)
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), IDS[:1, :5]], dim=1)
    mask = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1]])
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    close(logits(model, padded, attention_mask=mask, position_ids=positions)[:, 3:], logits(model, IDS[:1, :5]))


def test_hooks_leave_with_the_adapter():
    model = adapted()
    attention = decoder(model).layers[0].self_attn
    assert attention._forward_pre_hooks
    plain = model.unload()
    assert not plain.model.layers[0].self_attn._forward_pre_hooks
    assert torch.equal(logits(plain), logits(tiny.llama()))


def test_mistakes():
    with pytest.raises(ValueError, match="streams is at least 1"):
        ParscaleConfig(streams=0)
    model = adapted()
    model.add_adapter("other", config_of("parscale", streams=2, prefix=3))
    model.base_model.set_adapter(["default", "other"])
    with pytest.raises(ValueError, match="prefixes of different lengths"):
        logits(model)
