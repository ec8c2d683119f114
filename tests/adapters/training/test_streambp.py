"""Gradients in chunks are those of plain back-propagation; what is held at once falls with the chunk."""

from __future__ import annotations

import json
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import MistralConfig, MistralForCausalLM, Qwen2Config, Qwen2ForCausalLM

from benchmarks.allocated import peak_bytes
from tests import tiny
from toolkit.adapters.loop import token_losses as plain_losses
from toolkit.adapters.train import train
from toolkit.adapters.training.streambp import METHODS, streamed, token_losses
from toolkit.data.rows import write_rows
from toolkit.errors import SpecError, UnsupportedError

SIZES: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"num_key_value_heads": 2, "vocab_size": 90, "max_position_embeddings": 128, "pad_token_id": None}
SIZES |= {"bos_token_id": None, "eos_token_id": None}


def model_of(kind: str = "llama", attention: str = "sdpa") -> Any:
    torch.manual_seed(0)
    if kind == "qwen":  # biases, tied embeddings
        model = Qwen2ForCausalLM(Qwen2Config(**SIZES, tie_word_embeddings=True))
    elif kind == "mistral":  # a window
        model = MistralForCausalLM(MistralConfig(**SIZES, sliding_window=7))
    else:
        model = tiny.llama(**SIZES)
    model.set_attn_implementation(attention)
    return model.double().train()


def batch(rows: str = "whole", length: int = 23) -> dict[str, Tensor]:
    torch.manual_seed(1)
    ids = torch.randint(0, 90, (2, length))
    labels = torch.where(torch.rand(2, length) < 0.3, -100, ids)
    found = {"input_ids": ids, "labels": labels}
    if rows == "padded":
        found["attention_mask"] = torch.ones(2, length, dtype=torch.long)
        found["attention_mask"][1, 15:] = 0
        labels[1, 15:] = -100
    if rows == "packed":
        found["position_ids"] = torch.cat([torch.arange(9), torch.arange(length - 9)]).repeat(2, 1)
    return found


def gradients(model, losses: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    (losses.sum() / (losses != 0).sum()).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def plain(model, inputs) -> Tensor:
    given = {key: value for key, value in inputs.items() if key != "labels"}
    return plain_losses(model(**given, use_cache=False).logits, inputs["labels"])


def assert_same(model, inputs, chunk: int, logits_chunk: int, tolerance: float = 1e-6) -> None:
    """Float64 layers; the losses themselves are float32, which sets the tolerance."""
    wanted_losses = plain(model, inputs)
    wanted = gradients(model, wanted_losses)
    with streamed(model, chunk):
        losses = token_losses(model, inputs, logits_chunk)
        found = gradients(model, losses)
    torch.testing.assert_close(losses, wanted_losses, rtol=1e-6, atol=1e-6)
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        scale = float(value.abs().max()) or 1.0
        torch.testing.assert_close(found[name] / scale, value / scale, rtol=0, atol=tolerance, msg=name)


@pytest.mark.system("streambp")
@pytest.mark.parametrize("kind", ["llama", "qwen", "mistral"])
@pytest.mark.parametrize("rows", ["whole", "padded", "packed"])
def test_gradients_are_those_of_plain_training(kind, rows):
    """Chunks that divide nothing, tokens that are not trained, and the mean over all that are."""
    assert_same(model_of(kind), batch(rows), chunk=5, logits_chunk=4)


@pytest.mark.system("streambp")
@pytest.mark.parametrize(("chunk", "logits_chunk"), [(1, 1), (23, 22), (100, 100), (11, 7)])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_any_chunk_gives_the_same(chunk, logits_chunk, attention):
    assert_same(model_of(attention=attention), batch("padded"), chunk, logits_chunk)


@pytest.mark.system("streambp")
def test_layers_are_exact_to_float64():
    """Without the float32 losses: a quadratic of the last hidden states, to the rounding of doubles."""
    model, inputs = model_of(), batch()
    found = []
    for around in (nullcontext(), streamed(model, 6)):
        model.zero_grad()
        with around:
            (model.model(inputs["input_ids"], use_cache=False).last_hidden_state ** 2).mean().backward()
        found.append([p.grad.clone() for p in model.model.parameters()])
    for a, b in zip(*found, strict=True):
        assert float((a - b).abs().max()) <= 1e-13 * float(b.abs().max())


@pytest.mark.system("streambp")
def test_lora_gets_the_same_and_frozen_weights_none():
    config = LoraConfig(r=3, target_modules=["q_proj", "v_proj", "down_proj", "lm_head"], init_lora_weights=False)
    model: Any = get_peft_model(model_of(), config).double().train()
    assert_same(model, batch("padded"), chunk=5, logits_chunk=6)
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)


@pytest.mark.system("streambp")
def test_dropout_is_drawn_again_as_it_was():
    """The gradient of a step with dropout is the slope of its loss, measured by differences with the same seed."""
    torch.manual_seed(3)
    config = LoraConfig(r=2, target_modules="all-linear", lora_dropout=0.4, init_lora_weights=False)
    model: Any = get_peft_model(model_of(), config).double().train()
    inputs = batch()
    target = model.base_model.model.model.layers[0].self_attn.k_proj.lora_A["default"].weight
    direction, weights = torch.randn_like(target), torch.randn(2, 23, 32, dtype=torch.float64)

    def loss() -> Tensor:
        torch.manual_seed(7)
        return (model.base_model.model.model(inputs["input_ids"], use_cache=False).last_hidden_state * weights).sum()

    with streamed(model, 5):
        loss().backward()
        slope = float((target.grad * direction).sum())
        with torch.no_grad():
            target += 1e-4 * direction
            above = float(loss())
            target -= 2e-4 * direction
            below = float(loss())
    assert slope == pytest.approx((above - below) / 2e-4, rel=2e-3)  # the norms of transformers are float32
    # Chunks of the head draw masks of their own.
    head = torch.nn.Sequential(torch.nn.Dropout(0.5), torch.nn.Linear(4, 9)).double()
    from toolkit.adapters.training._chunks import HeadRun, StreamedLoss, Surroundings

    hidden = torch.ones(1, 7, 4, dtype=torch.float64, requires_grad=True)
    run = HeadRun(head, torch.ones(1, 7, dtype=torch.long), 1, Surroundings(torch.device("cpu")))
    losses: Tensor = StreamedLoss.apply(run, hidden)  # pyright: ignore[reportAssignmentType]
    assert len({round(float(x), 6) for x in losses.detach()[0]}) > 1


@pytest.mark.system("streambp")
def test_bfloat16_casts_as_in_the_forward_pass():
    model, inputs = model_of().float(), batch("padded")
    found, kinds = [], set()
    down = model.model.layers[0].mlp.down_proj
    down.register_forward_hook(lambda module, given, out: kinds.add(out.dtype))
    for stream in (False, True):
        model.zero_grad()
        with streamed(model, 5) if stream else nullcontext():
            kinds.clear()  # of the look at the head
            with torch.autocast("cpu", torch.bfloat16):
                losses = token_losses(model, inputs, 4) if stream else plain(model, inputs)
            found.append(gradients(model, losses))
    for name, value in found[0].items():
        error = (found[1][name] - value).norm() / value.norm()
        assert error < 0.02, (name, error)
    assert kinds == {torch.bfloat16}, "in the passes of the backward pass too"


@pytest.mark.system("streambp")
def test_memory_falls_with_the_chunk_and_logits_are_never_whole():
    torch.manual_seed(0)
    model = tiny.llama(
        num_hidden_layers=4, vocab_size=4096, intermediate_size=256, max_position_embeddings=2048
    ).train()
    length = 512
    inputs = {"input_ids": torch.randint(0, 4096, (1, length))}
    inputs["labels"] = inputs["input_ids"]

    def step(losses) -> None:
        gradients(model, losses())

    gradients(model, plain(model, inputs))  # gradients are there before anything is measured
    base = peak_bytes(lambda: step(lambda: plain(model, inputs)))
    model.activation_checkpointing_enable({"use_reentrant": False})
    checkpointed = peak_bytes(lambda: step(lambda: plain(model, inputs)))
    model.activation_checkpointing_disable()
    found = []
    for chunk in (512, 128, 32):
        with streamed(model, chunk):
            found.append(peak_bytes(lambda chunk=chunk: step(lambda: token_losses(model, inputs, chunk))))
    logits = length * 4096 * 4
    assert found[0] == pytest.approx(checkpointed, rel=0.1), "one chunk is ordinary checkpointing"
    assert base > checkpointed > found[1] > found[2]
    assert found[2] < logits < checkpointed


@pytest.mark.system("streambp")
def test_a_longer_sequence_fits_than_with_gradient_checkpointing():
    """Under a cap on what is allocated during a step, lengths doubled until one no longer fits."""
    torch.manual_seed(0)
    model = tiny.llama(vocab_size=8192, intermediate_size=192, max_position_embeddings=1 << 14).train()
    cap, longest = 64 << 20, {}
    for name in ("checkpointing", "streambp"):
        for length in (256, 512, 1024, 2048, 4096):
            ids = torch.randint(0, 8192, (1, length))
            inputs = {"input_ids": ids, "labels": ids}
            around = streamed(model, 256) if name == "streambp" else nullcontext()
            if name == "checkpointing":
                model.activation_checkpointing_enable({"use_reentrant": False})
            model.zero_grad()
            with around:
                losses = (
                    partial(token_losses, model, inputs, 128) if name == "streambp" else partial(plain, model, inputs)
                )
                peak = peak_bytes(lambda losses=losses: gradients(model, losses()))
            model.activation_checkpointing_disable()
            if peak > cap:
                break
            longest[name] = length
    assert longest["streambp"] >= 8 * longest["checkpointing"]


@pytest.mark.system("streambp")
@pytest.mark.parametrize("method", METHODS)
def test_runs_take_the_same_steps(base, tmp_path, method):
    write_rows(tmp_path / "a.jsonl", [{"prompt": f"{i} ", "completion": "abc" * (1 + i % 5)} for i in range(16)])
    entries = []
    for name, methods in (("plain", ()), ("streamed", {"method": "streambp", "chunk": 6, "logits_chunk": 5})):
        spec = {
            "base": str(base),
            "adapter": {"method": method} | {"oft": {"oft_block_size": 24}, "miss": {"r": 8}}.get(method, {}),
            "data": {"train": str(tmp_path / "a.jsonl")},
            "training": {
                "max_steps": 3,
                "batch_size": 4,
                "learning_rate": 0.01,
                "logging_steps": 1,
                "methods": methods,
            },
            "device": "cpu",
        }
        folder = train(spec, tmp_path / name, quiet=True).path
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        entries.append([(e["loss"], e["grad_norm"]) for e in lines if "grad_norm" in e])
    torch.testing.assert_close(torch.tensor(entries[1]), torch.tensor(entries[0]), rtol=2e-4, atol=1e-5)
    assert entries[0][0] != entries[0][2], "it learns"


@pytest.mark.system("streambp")
def test_preferences_take_the_same_steps(base, tmp_path):
    rows = [{"prompt": f"{i} ", "chosen": "yes" * (1 + i % 3), "rejected": "no"} for i in range(8)]
    write_rows(tmp_path / "a.jsonl", rows)
    entries = []
    for name, methods in (("plain", ()), ("streamed", {"method": "streambp", "chunk": 4, "logits_chunk": 3})):
        training = {"max_steps": 3, "batch_size": 4, "learning_rate": 0.01, "logging_steps": 1, "methods": methods}
        spec = {"base": str(base), "objective": "dpo", "data": {"train": str(tmp_path / "a.jsonl")}, "device": "cpu"}
        folder = train(spec | {"training": training}, tmp_path / name, quiet=True).path
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        entries.append([(e["loss"], e["grad_norm"]) for e in lines if "grad_norm" in e])
    torch.testing.assert_close(torch.tensor(entries[1]), torch.tensor(entries[0]), rtol=2e-4, atol=1e-5)


def test_what_cannot_be_cut_is_refused(base, tmp_path):
    from transformers import GraniteConfig, GraniteForCausalLM

    with pytest.raises(UnsupportedError, match="changes the logits of its head"):
        streamed(GraniteForCausalLM(GraniteConfig(**SIZES, logits_scaling=3.0)), 4).__enter__()
    training = {"methods": "streambp", "gradient_checkpointing": True}
    spec = {"base": str(base), "adapter": {"method": "prefix_tuning", "num_virtual_tokens": 2}, "training": training}
    with pytest.raises(SpecError) as error:
        train(spec | {"data": {"train": "a"}}, tmp_path / "out", quiet=True)
    assert "streambp goes with full, hra" in str(error.value)
    assert "streambp keeps less than it already" in str(error.value)


def test_a_model_comes_back_as_it_was():
    model = model_of()
    before = [dict(vars(m)) for m in model.modules()]
    forward = model.lm_head.forward
    with streamed(model, 4):
        token_losses(model, batch(), 4)
    assert model.lm_head.forward == forward
    for module, own in zip(model.modules(), before, strict=True):
        changed = {k for k in vars(module) if vars(module)[k] is not own.get(k)} - {"gradient_checkpointing"}
        assert changed <= {"_gradient_checkpointing_func"}
        assert not getattr(module, "gradient_checkpointing", False)
