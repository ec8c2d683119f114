"""Gradients from windows of any sizes are those of plain back-propagation; a run takes the plain trainer's steps."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, GPT2Config, GPT2LMHeadModel

from tests import tiny
from tests.adapters.training.test_streambp import SIZES, batch, gradients, model_of, plain
from toolkit.adapters.train import train
from toolkit.adapters.training._windows import PACE, Document, Pass, Steady, Turn, documents
from toolkit.adapters.training.token_windows import back_propagate, check_windows, score
from toolkit.data.rows import write_rows
from toolkit.errors import SpecError, UnsupportedError


class Sizes:
    """Windows of given sizes, forward and backward, over and over; notes what was spent."""

    def __init__(self, forward: list[int], backward: list[int]) -> None:
        self.forward, self.backward, self.turns = forward, backward, list[Turn]()

    @contextmanager
    def turn(self) -> Iterator[Turn]:
        at = len(self.turns)
        turn = Turn(self.forward[at % len(self.forward)], self.backward[at % len(self.backward)])
        yield turn
        self.turns.append(turn)


def lora(model: Any, **options: Any) -> Any:
    torch.manual_seed(3)
    adapted = get_peft_model(model, LoraConfig(r=4, init_lora_weights=False, task_type="CAUSAL_LM", **options))
    return adapted.double().train()


def windowed(model: Any, inputs: dict[str, Tensor], pace: Any) -> dict[str, Tensor]:
    model.zero_grad()
    scale = 1 / (inputs["labels"][:, 1:] != -100).sum().double()
    for document in documents(inputs):
        back_propagate(model, document, pace, scale)
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_close(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    """Float64 layers, float32 losses."""
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        scale = float(value.abs().max()) or 1.0
        torch.testing.assert_close(found[name] / scale, value / scale, rtol=0, atol=1e-6, msg=name)


PACES = {
    "one token": Sizes([1], [1]),
    "5, 3 and 4": Sizes([5, 3, 4], [4, 3, 5]),
    "forward and backward cut elsewhere": Sizes([6, 2], [1, 7, 3]),
    "all at once": Sizes([1], [100]),
    "steady": Steady(6),
}


@pytest.mark.system("flexllm")
@pytest.mark.parametrize("pace", PACES.values(), ids=PACES)
@pytest.mark.parametrize("rows", ["whole", "padded", "packed"])
def test_gradients_are_those_of_plain_training(pace, rows):
    model, inputs = lora(model_of(), target_modules="all-linear"), batch(rows)
    if rows == "packed":
        inputs["labels"][:, 9] = -100  # as the collator has it: no document predicts the first token of another
    wanted = gradients(model, plain(model, inputs))
    given = {key: value for key, value in inputs.items() if key != "attention_mask"}
    assert_close(windowed(model, given, pace), wanted)


@pytest.mark.system("flexllm")
@pytest.mark.parametrize("kind", ["qwen", "mistral", "gemma", "gpt2"])
def test_gradients_on_other_decoders(kind):
    if kind == "gemma":  # a window in every other layer, soft caps, tied embeddings
        config = Gemma3TextConfig(**{**SIZES, "pad_token_id": 0}, head_dim=8, sliding_window=6)
        model: Any = Gemma3ForCausalLM(config).double().train()
    elif kind == "gpt2":
        pdrop: dict[str, Any] = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=90, n_positions=64, **pdrop))
        model = model.double().train()
    else:
        model = model_of(kind)
    options: dict[str, Any] = {"target_modules": ["k_proj", "v_proj", "down_proj"]}
    if kind == "gpt2":
        options = {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}
    model, inputs = lora(model, **options), batch()
    check_windows(model)
    assert_close(windowed(model, inputs, Sizes([4, 7], [5, 2])), gradients(model, plain(model, inputs)))


def test_a_fully_trained_model_and_dora_have_the_same_gradients_too():
    for model in (model_of("qwen"), lora(model_of(), target_modules=["q_proj", "up_proj"], use_dora=True)):
        wanted = gradients(model, plain(model, batch()))
        assert_close(windowed(model, batch(), Sizes([5], [4])), wanted)


@pytest.mark.system("flexllm")
def test_what_only_gradients_of_frozen_weights_would_need_is_not_kept():
    model = lora(model_of(), target_modules=["q_proj", "v_proj"])
    wanted = gradients(model, plain(model, batch()))
    inputs_of, kept, handles = dict[str, int](), set[int](), []

    def note(name: str) -> Any:
        def hook(module: nn.Module, given: tuple[Tensor, ...]) -> None:
            inputs_of[name] = given[0].untyped_storage().data_ptr()
            alive.append(given[0])  # so that its address is not given to another

        return hook

    alive: list[Tensor] = []
    for name, module in model.named_modules():
        if name.endswith(("down_proj", "gate_proj", "layers.1.self_attn.v_proj")):
            handles.append(module.register_forward_pre_hook(note(name)))
    (document,) = documents({key: value[:1] for key, value in batch().items()})

    def keep(tensor: Tensor) -> Tensor:
        kept.add(tensor.untyped_storage().data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        back_propagate(model, document, Steady(100), torch.tensor(1.0))
    frozen = {name for name in inputs_of if "_proj" in name and "v_proj" not in name}
    assert len(frozen) == 4
    assert not kept & {inputs_of[name] for name in frozen}
    (adapted,) = (name for name in inputs_of if name.endswith("v_proj"))
    assert inputs_of[adapted] in kept
    for handle in handles:
        handle.remove()
    assert_close(windowed(model, batch(), Steady(100)), wanted)


def test_activations_of_one_window_at_a_time():
    from benchmarks.allocated import peak_bytes

    model = lora(model_of(), target_modules="all-linear").float()
    ids = torch.randint(0, 90, (1, 121), generator=torch.Generator().manual_seed(0))
    (document,) = documents({"input_ids": ids, "labels": ids})

    def run(window: int) -> int:
        return peak_bytes(lambda: back_propagate(model, document, Steady(window), torch.tensor(1.0)))

    run(120)
    # What grows with the whole document is keys and values, and their gradients; as much as 15 tokens' activations.
    assert run(15) < run(120) / 2


def test_turns_are_kept_to_and_nothing_is_computed_for_what_is_not_trained():
    pace = Sizes([5], [3])
    ids = torch.arange(20)[None]
    labels = torch.full_like(ids, -100)
    labels[0, 9:14] = ids[0, 9:14]
    (document,) = documents({"input_ids": ids, "labels": labels})
    assert document.ids.tolist() == list(range(13))
    back_propagate(model_of(), document, pace, torch.tensor(1.0))
    assert [(t.spent_forward, t.spent_backward) for t in pace.turns] == [(5, 0), (5, 0), *[(0, 3)] * 4, (0, 1)]
    assert list(documents({"input_ids": ids, "labels": torch.full_like(ids, -100)})) == []


def test_losses_without_gradients_are_those_of_the_whole():
    model, inputs = model_of("mistral"), batch("packed")
    inputs["labels"][:, 9] = -100
    wanted = plain(model, inputs)
    for document in documents(inputs):
        own = slice(document.start, document.start + len(document.ids))
        torch.testing.assert_close(score(model, document, Steady(4)), wanted[document.row, own].detach())
        walk = Pass(model, document)
        while walk.left:
            walk.advance(Turn(3, 2), torch.tensor(0.0))
        torch.testing.assert_close(walk.losses, wanted[document.row, own].detach())


SPEC: dict[str, Any] = {"base": "toolkit:base", "adapter": {"method": "lora", "r": 4}, "device": "cpu"}
TRAINING: dict[str, Any] = {"max_steps": 4, "batch_size": 3, "learning_rate": 0.01, "logging_steps": 1}


def run(folder, training: dict[str, Any], **data: Any) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    from safetensors.torch import load_file

    rows = [{"prompt": f"Sort {'cab' * n}:", "completion": f"{'abc' * n}"} for n in range(1, 13)]
    write_rows(folder / "rows.jsonl", rows)
    data = {"train": str(folder / "rows.jsonl"), "validation": str(folder / "rows.jsonl"), **data}
    out = folder / f"out{len(list(folder.iterdir()))}"
    train({**SPEC, "data": data, "training": {**TRAINING, **training}}, out, quiet=True)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return lines, load_file(out / "adapter_model.safetensors")


@pytest.mark.system("flexllm")
@pytest.mark.parametrize("options", [{"gradient_accumulation_steps": 2}, {"weight_decay": 0.1, "max_grad_norm": 0.1}])
def test_a_run_takes_the_steps_of_the_plain_trainer(tmp_path, options):
    wanted, weights = run(tmp_path, options)
    found, own = run(tmp_path, {**options, "methods": {"method": "token_windows", "window": 7}})
    for line, other in zip(found, wanted, strict=True):
        for name in {"loss", "grad_norm", "eval_loss"} & other.keys():
            assert line[name] == pytest.approx(other[name], rel=1e-4), name
    assert own.keys() == weights.keys()
    for name, value in weights.items():
        torch.testing.assert_close(own[name], value, rtol=0, atol=2e-4)


def test_packed_rows_train_alike(tmp_path):
    wanted, _ = run(tmp_path, {"max_steps": 2}, packing=True, max_length=96)
    found, _ = run(tmp_path, {"max_steps": 2, "methods": "token_windows"}, packing=True, max_length=96)
    losses = [[line["loss"] for line in lines if "loss" in line] for lines in (found, wanted)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_a_pace_of_the_context_sets_the_windows(tmp_path):
    pace = Sizes([6], [5])
    token = PACE.set(pace)
    try:
        run(tmp_path, {"max_steps": 1, "methods": "token_windows"})
    finally:
        PACE.reset(token)
    assert {t.spent_backward for t in pace.turns} <= set(range(6))
    assert sum(t.spent_backward for t in pace.turns) > 20


def test_refuses_what_it_cannot_compute(tmp_path):
    def spec(**changes: Any) -> dict[str, Any]:
        write_rows(tmp_path / "rows.jsonl", [{"prompt": "a", "completion": "b"}])
        training = {"max_steps": 1, "methods": ["token_windows"], **changes.pop("training", {})}
        return {**SPEC, "data": {"train": str(tmp_path / "rows.jsonl")}, "training": training, **changes}

    for changes, message in (
        ({"training": {"gradient_checkpointing": True}}, "token_windows keeps less than it already"),
        ({"training": {"methods": ["token_windows", "mftcoder"]}}, "mftcoder changes a loss that token_windows"),
        ({"training": {"methods": ["token_windows", "streambp"]}}, "both set the token losses"),
        ({"adapter": {"method": "prefix_tuning", "num_virtual_tokens": 2}}, "token_windows goes with full"),
    ):
        with pytest.raises(SpecError, match=message):
            train(spec(**changes), tmp_path / "out", quiet=True)
    with pytest.raises(UnsupportedError, match=r"lora_dropout.* drops 0.1 of them; set its dropout to 0"):
        train(spec(adapter={"method": "lora", "lora_dropout": 0.1}), tmp_path / "out", quiet=True)
    strange: Any = tiny.llama()
    attention = strange.model.layers[0].self_attn
    own, attention.forward = attention.forward, _forgetful(attention.forward)
    with pytest.raises(UnsupportedError, match="keeps no keys and values"):
        check_windows(strange)
    attention.forward = own
    strange.model.layers[1].mlp.forward = _looking_back(strange.model.layers[1].mlp.forward)
    with pytest.raises(UnsupportedError, match="computes otherwise with a cache"):
        check_windows(strange)


def _forgetful(forward: Any) -> Any:
    """Attend to a window's own tokens alone."""

    def call(*given: Any, past_key_values: Any = None, **options: Any) -> Any:
        return forward(*given, **{**options, "attention_mask": None})

    return call


def _looking_back(forward: Any) -> Any:
    """Mix tokens outside of attention, which no cache of keys and values knows of."""
    return lambda hidden: forward(hidden.cumsum(dim=1))


def test_document_of_one_token_of_context():
    document = Document(0, 0, torch.tensor([4]), torch.tensor([7]))
    model = model_of()
    loss = back_propagate(model, document, Steady(3), torch.tensor(1.0))
    logits = model(input_ids=torch.tensor([[4]])).logits[0].float()
    torch.testing.assert_close(loss, nn.functional.cross_entropy(logits, torch.tensor([7]), reduction="none").detach())
