"""Training runs on real files: what is trained, resumed, stopped, kept and said."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
import yaml
from peft import LoraConfig, PeftModel
from tensorboardX.proto.event_pb2 import Event
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import toolkit
from toolkit.adapters.callbacks import ShowProgress
from toolkit.adapters.config import peft_config
from toolkit.adapters.packing import leak
from toolkit.adapters.runs import METRICS
from toolkit.adapters.spec import AdapterSpec
from toolkit.adapters.train import train
from toolkit.checkpoints.adapters import open_adapter
from toolkit.data.rows import write_rows
from toolkit.embedded.tokenizer import VOCAB_SIZE, build_tokenizer
from toolkit.errors import DataError, MissingError, OutputError, SpecError
from toolkit.models.load import LoadedModel, quiet_transformers


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    rows = [{"prompt": f"number {i} is ", "completion": str(i * 7 % 10)} for i in range(60)]
    write_rows(folder / "train.jsonl", rows[:48])
    write_rows(folder / "validation.jsonl", rows[48:])
    return folder


def spec_of(base: Path, data: Path, **training) -> dict:
    settings = {"max_steps": 8, "batch_size": 8, "learning_rate": 1e-2, "logging_steps": 2, "seed": 3} | training
    return {
        "base": str(base),
        "adapter": {"method": "lora", "r": 2, "lora_alpha": 4},
        "data": {"train": str(data / "train.jsonl"), "validation": str(data / "validation.jsonl")},
        "training": settings,
        "device": "cpu",
    }


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / METRICS).read_text().splitlines()]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    store = open_adapter(folder).store
    return {name: store.tensor(name) for name in store.tensors}


def test_adapter_is_what_stock_peft_loads(base, data, tmp_path):
    result = train(spec_of(base, data), tmp_path / "out", quiet=True)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(result.path))
    ids = torch.tensor([[1, 2, 3, 4]])
    with torch.inference_mode():
        attached, plain = model(ids).logits, AutoModelForCausalLM.from_pretrained(base)(ids).logits
    assert (attached - plain).abs().max() > 0.01
    assert open_adapter(result.path).base_model == str(base)
    losses = [entry["loss"] for entry in metrics(result.path) if "loss" in entry]
    assert losses[-1] < losses[0]
    assert result.numbers["steps"] == 8
    assert math.isfinite(result.numbers["eval_loss"])
    front = yaml.safe_load((result.path / "README.md").read_text().split("---")[1])
    assert front["base_model"] == [str(base)]
    assert json.loads((result.path / "training.json").read_text())["spec"]["training"]["seed"] == 3
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_first_loss_is_that_of_the_base_on_the_completions(base, data, tmp_path):
    """At the start a LoRA changes nothing, so the loss is the base's own, over exactly the completion tokens."""
    spec = spec_of(base, data, max_steps=1, batch_size=48, logging_steps=1)
    result = train(spec, tmp_path / "out", quiet=True)
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base)
    total, count = 0.0, 0
    for line in (data / "train.jsonl").read_text().splitlines():
        row = json.loads(line)
        asked = tokenizer.encode(row["prompt"])
        ids = asked + tokenizer.encode(row["completion"]) + [tokenizer.eos_token_id]
        with torch.inference_mode():
            logs = torch.log_softmax(model(torch.tensor([ids])).logits[0], dim=-1)
        for position in range(len(asked), len(ids)):
            total -= logs[position - 1, ids[position]].item()
            count += 1
    assert metrics(result.path)[0]["loss"] == pytest.approx(total / count, rel=1e-4)


def test_evaluation_of_packed_rows_is_that_of_their_documents(base, data, tmp_path):
    losses = []
    for packing in (False, True):
        spec = spec_of(base, data, max_steps=1, batch_size=100, learning_rate=1e-9)
        spec["data"] = {"train": spec["data"]["validation"], "validation": spec["data"]["train"]}
        spec["data"] |= {"packing": packing, "max_length": 2000}
        losses.append(train(spec, tmp_path / str(packing), quiet=True).numbers["eval_loss"])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


@pytest.mark.parametrize("packing", [False, True])
def test_gradients_do_not_depend_on_how_rows_are_batched(packing, base, data, tmp_path):
    whole = spec_of(base, data, max_steps=3, batch_size=48)
    parts = spec_of(base, data, max_steps=3, batch_size=12, gradient_accumulation_steps=4)
    if packing:
        whole = spec_of(base, data, max_steps=3, batch_size=100)
        whole["data"] = whole["data"] | {"packing": True, "max_length": 64}
    a = weights(train(whole, tmp_path / "a", quiet=True).path)
    b = weights(train(parts, tmp_path / "b", quiet=True).path)
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-3, atol=1e-5)


def test_same_seed_same_bytes_and_other_seed_others(base, data, tmp_path):
    files = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        out = train(spec_of(base, data, seed=seed), tmp_path / name, quiet=True).path
        files.append((out / "adapter_model.safetensors").read_bytes())
    assert files[0] == files[1] != files[2]


KILLED = """
import json, os, sys
from toolkit.adapters import callbacks
from toolkit.adapters.train import train
stop = int(sys.argv[2])
old = callbacks.ShowProgress.on_step_end
def on_step_end(self, args, state, control, **kwargs):
    if state.global_step == stop:
        os.kill(os.getpid(), 9)
    old(self, args, state, control, **kwargs)
callbacks.ShowProgress.on_step_end = on_step_end
train(sys.argv[1], sys.argv[3], quiet=True)
"""


def test_killed_run_resumes_to_the_same_loss_to_the_last_digit(base, data, tmp_path):
    spec = spec_of(base, data, max_steps=9, save_steps=2, logging_steps=1)
    path = tmp_path / "spec.yaml"
    path.write_text(yaml.safe_dump(spec))
    undisturbed = train(path, tmp_path / "undisturbed", quiet=True).path
    done = subprocess.run([sys.executable, "-c", KILLED, path, "5", tmp_path / "killed"])
    assert done.returncode == -signal.SIGKILL
    assert not (tmp_path / "killed").exists()
    partial = tmp_path / ".killed.partial"
    # A checkpoint that the kill cut off has no state yet; it must not be gone on from.
    cut_off = partial / "checkpoints" / "checkpoint-6"
    cut_off.mkdir()
    (cut_off / "adapter_model.safetensors").write_bytes(b"half")
    train(path, tmp_path / "killed", resume=True, quiet=True)
    assert (tmp_path / "killed" / "adapter_model.safetensors").read_bytes() == (
        undisturbed / "adapter_model.safetensors"
    ).read_bytes()
    assert losses(tmp_path / "killed") == losses(undisturbed)
    assert [e["step"] for e in losses(undisturbed) if "loss" in e] == list(range(1, 10))


def test_resume_refuses_what_is_not_the_same_run(base, data, tmp_path):
    with pytest.raises(OutputError, match="no run to resume here"):
        train(spec_of(base, data), tmp_path / "out", resume=True, quiet=True)
    path = tmp_path / "spec.yaml"
    path.write_text(yaml.safe_dump(spec_of(base, data, save_steps=1)))
    subprocess.run([sys.executable, "-c", KILLED, path, "2", tmp_path / "out"])
    with pytest.raises(OutputError, match="the spec or its data changed"):
        train(spec_of(base, data, save_steps=1, learning_rate=5e-3), tmp_path / "out", resume=True, quiet=True)


class StopError(Exception):
    """Ends a run as a kill does: what is on the disk stays there."""


def losses(folder: Path) -> list[dict]:
    keys = ("step", "loss", "eval_loss", "grad_norm", "learning_rate")
    return [{k: v for k, v in e.items() if k in keys} for e in metrics(folder) if "loss" in e or "eval_loss" in e]


def stop_at(monkeypatch, step: int) -> None:
    old = ShowProgress.on_step_end

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == step:
            raise StopError
        old(self, args, state, control, **kwargs)

    monkeypatch.setattr(ShowProgress, "on_step_end", on_step_end)


def test_resumed_run_has_the_patience_of_the_undisturbed_one(base, data, tmp_path, monkeypatch):
    spec = spec_of(base, data, max_steps=60, learning_rate=0.3, eval_steps=1, early_stopping_patience=2)
    undisturbed = train(spec, tmp_path / "undisturbed", quiet=True)
    with monkeypatch.context() as patched:  # one evaluation without a better loss is behind it
        stop_at(patched, undisturbed.numbers["steps"])
        with pytest.raises(StopError):
            train(spec, tmp_path / "out", quiet=True)
    resumed = train(spec, tmp_path / "out", resume=True, quiet=True)
    same = ("steps", "best_step", "eval_loss", "train_loss")
    assert {k: resumed.numbers[k] for k in same} == {k: undisturbed.numbers[k] for k in same}
    assert losses(resumed.path) == losses(undisturbed.path)


@pytest.mark.parametrize("training", [{"save_steps": 4}, {"eval_steps": 1, "early_stopping_patience": 2}])
def test_run_that_was_killed_at_its_very_end_takes_no_step_more(training, base, data, tmp_path, monkeypatch):
    spec = spec_of(base, data, learning_rate=0.3, **training)
    undisturbed = train(spec, tmp_path / "undisturbed", quiet=True)

    def write_records(*_):
        raise StopError

    with monkeypatch.context() as patched:
        patched.setattr("toolkit.adapters.train.write_records", write_records)
        with pytest.raises(StopError):
            train(spec, tmp_path / "out", quiet=True)
    resumed = train(spec, tmp_path / "out", resume=True, quiet=True)
    same = ("steps", "best_step", "eval_loss", "train_loss")
    assert {k: resumed.numbers[k] for k in same} == {k: undisturbed.numbers[k] for k in same}
    name = "adapter_model.safetensors"
    assert (resumed.path / name).read_bytes() == (undisturbed.path / name).read_bytes()
    assert not (resumed.path / "run.json").exists()


def test_mean_loss_is_over_all_steps_wherever_checkpoints_and_entries_fall(base, data, tmp_path, monkeypatch):
    every = train(spec_of(base, data, logging_steps=1), tmp_path / "every", quiet=True)
    mean = sum(e["loss"] for e in metrics(every.path) if "loss" in e) / 8
    assert every.numbers["train_loss"] == pytest.approx(mean)
    spec = spec_of(base, data, logging_steps=5, save_steps=3)
    undisturbed = train(spec, tmp_path / "undisturbed", quiet=True)
    with monkeypatch.context() as patched:
        stop_at(patched, 5)
        with pytest.raises(StopError):
            train(spec, tmp_path / "out", quiet=True)
    with (tmp_path / ".out.partial" / METRICS).open("a") as file:
        file.write('{"step": 4, "lo')  # the kill cut it off
    resumed = train(spec, tmp_path / "out", resume=True, quiet=True)
    assert losses(resumed.path) == losses(undisturbed.path)
    assert resumed.numbers["train_loss"] == undisturbed.numbers["train_loss"] == pytest.approx(mean)


def test_note_of_a_run_that_is_cut_off_is_no_note(base, data, tmp_path):
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial" / "run.json").write_text('{"finger')
    with pytest.raises(OutputError, match="no run to resume here"):
        train(spec_of(base, data), tmp_path / "out", resume=True, quiet=True)


def test_home_is_expanded_and_every_data_file_is_hashed(base, data, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copytree(base, tmp_path / "base")
    for name in "ab":
        (tmp_path / name).mkdir()
        write_rows(tmp_path / name / "rows.jsonl", [{"prompt": name, "completion": name}])
    files = {"train": ["~/a/rows.jsonl", "~/b/rows.jsonl"], "validation": "~/b/rows.jsonl"}
    spec = spec_of(base, data, max_steps=1) | {"base": "~/base", "data": files, "out": "~/made/out"}
    result = train(spec, quiet=True)
    assert result.path == tmp_path / "made" / "out"
    assert open_adapter(result.path).base_model == str(tmp_path / "base")
    expected = {f"~/{n}/rows.jsonl": tmp_path / n / "rows.jsonl" for n in "ab"}
    expected["adapter_model.safetensors"] = result.path / "adapter_model.safetensors"
    hashes = {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in expected.items()}
    assert json.loads((result.path / "training.json").read_text())["sha256"] == hashes
    card = (result.path / "README.md").read_text()
    assert all(f"| {name} | {value} |" in card for name, value in hashes.items())
    last = card.splitlines()[-1]
    assert all(f"{name} {version(name)}" in last for name in ("torch", "transformers", "peft", "accelerate"))
    spec["data"] = {"train": "~/absent.jsonl"}
    with pytest.raises(MissingError, match=r"absent\.jsonl: no such data file"):
        train(spec, tmp_path / "other", quiet=True)
    assert not list(tmp_path.glob("*other*"))


def model_of(kind: str) -> LoadedModel:
    sizes = {
        "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32, "bos_token_id": 256, "eos_token_id": 257},
        "bloom": {},
        "mamba": {"state_size": 4},
        "gpt2": {"n_positions": 64, "bos_token_id": 256, "eos_token_id": 257},
        "llama": {"intermediate_size": 64},
    }
    common = {"vocab_size": VOCAB_SIZE, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = AutoConfig.for_model(kind, **common, **sizes[kind])
    torch.manual_seed(0)
    with quiet_transformers():
        return LoadedModel(kind, AutoModelForCausalLM.from_config(config).eval(), build_tokenizer(64))


@pytest.mark.parametrize(
    ("kind", "apart"), [("opt", False), ("bloom", False), ("mamba", False), ("gpt2", True), ("llama", True)]
)
def test_leaks_between_packed_documents_are_found(kind, apart):
    loaded = model_of(kind)
    loaded.model.train()  # dropout must not look like a leak
    for batch in (1, 2):
        assert (leak(loaded, batch) < 1e-3) == apart
    assert loaded.model.training


def test_packing_is_refused_where_it_leaks(data, tmp_path):
    loaded = model_of("opt")
    spec = spec_of(Path(), data, max_steps=1) | {"base": (loaded.model, loaded.tokenizer)}
    spec["data"] = {"train": str(data / "train.jsonl"), "packing": True}
    with pytest.raises(
        SpecError, match=r"data\.packing: the model with lora does not keep packed documents apart; set it to"
    ):
        train(spec, tmp_path / "out", quiet=True)
    assert not list(tmp_path.iterdir())
    spec["data"] |= {"packing": False}
    assert train(spec, tmp_path / "out", quiet=True).numbers["steps"] == 1


def test_packed_rows_alone_may_be_longer_than_the_context(data, tmp_path):
    """GPT-2 has a table of 64 positions; a packed row of 150 tokens, padded, reads no other."""
    loaded = model_of("gpt2")
    found = []
    for packing in (False, True):
        spec = spec_of(Path(), data, max_steps=1, batch_size=7, learning_rate=1e-9)
        spec |= {"base": (loaded.model, loaded.tokenizer), "adapter": {"r": 2, "fan_in_fan_out": True}}
        spec["data"] |= {"packing": packing, "max_length": 150}
        found.append(train(spec, tmp_path / str(packing), quiet=True).numbers["eval_loss"])
    assert found[1] == pytest.approx(found[0], rel=1e-4)
    write_rows(tmp_path / "long.jsonl", [{"text": "x" * 100}])
    spec["data"] = {"train": str(tmp_path / "long.jsonl"), "max_length": 150}
    with pytest.raises(DataError, match=r"long\.jsonl:1: 101 tokens, but the model takes at most 64"):
        train(spec, tmp_path / "long", quiet=True)


@pytest.mark.parametrize(
    "options",
    [
        {"use_dora": True},
        {"use_rslora": True},
        {"rank_pattern": {"q_proj": 4}, "target_modules": ["q_proj", "up_proj"]},
    ],
)
def test_kinds_of_lora(options, base, data, tmp_path):
    spec = spec_of(base, data, max_steps=2)
    spec["adapter"] = spec["adapter"] | options
    adapter = open_adapter(train(spec, tmp_path / "out", quiet=True).path)
    for key, value in options.items():
        got = adapter.config[key]
        assert sorted(got) == sorted(value) if isinstance(value, list) else got == value
    assert adapter.is_dora == bool(options.get("use_dora"))


def test_full_training_writes_a_model(base, data, tmp_path):
    spec = spec_of(base, data, learning_rate=1e-3) | {"adapter": {"method": "full"}}
    result = train(spec, tmp_path / "out", quiet=True)
    model = AutoModelForCausalLM.from_pretrained(result.path)
    assert AutoTokenizer.from_pretrained(result.path).chat_template
    assert result.numbers["trainable_parameters"] == sum(p.numel() for p in model.parameters())
    start = AutoModelForCausalLM.from_pretrained(base).state_dict()
    assert all(not torch.equal(value, start[name]) for name, value in model.state_dict().items() if "proj" in name)


def test_random_initialization_needs_no_weights(base, data, tmp_path):
    bare = tmp_path / "bare"
    bare.mkdir()
    for file in base.iterdir():
        if not file.name.endswith("safetensors"):
            (bare / file.name).write_bytes(file.read_bytes())
    spec = spec_of(bare, data, max_steps=2) | {"adapter": {"method": "full"}, "initialize": "random"}
    files = [(train(spec, tmp_path / n, quiet=True).path / "model.safetensors").read_bytes() for n in "ab"]
    assert files[0] == files[1]


def test_early_stopping_keeps_the_best_checkpoint(base, data, tmp_path):
    # So high a rate that the loss soon rises again.
    rhythm = {"eval_steps": 1, "early_stopping_patience": 2, "keep_checkpoints": True}
    result = train(spec_of(base, data, max_steps=60, learning_rate=0.3, **rhythm), tmp_path / "out", quiet=True)
    evals = [e["eval_loss"] for e in metrics(result.path) if "eval_loss" in e]
    assert result.numbers["steps"] < 60
    best = evals.index(min(evals)) + 1
    assert result.numbers["best_step"] == best
    assert result.numbers["eval_loss"] == min(evals)
    kept = weights(result.path)
    saved = weights(result.path / "checkpoints" / f"checkpoint-{best}")
    assert all(torch.equal(kept[name], saved[name]) for name in kept)


def test_early_stopping_keeps_the_checkpoints_of_save_steps_too(base, data, tmp_path):
    spec = spec_of(base, data, eval_steps=4, save_steps=3, early_stopping_patience=5, save_total_limit=9)
    spec["training"]["keep_checkpoints"] = True
    result = train(spec, tmp_path / "out", quiet=True)
    assert sorted(p.name for p in (result.path / "checkpoints").iterdir()) == [
        f"checkpoint-{step}" for step in (3, 4, 6, 8)
    ]


@pytest.mark.filterwarnings("ignore::peft.utils.warning.PeftWarning")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lora_bias": True}, "PEFT alone reads this adapter: .*lora_bias"),
        ({"trainable_token_indices": [5]}, "PEFT alone reads this adapter: .*trainable_token_indices"),
        ({"target_modules": ["embed_tokens"]}, "can be merged but not served: it adapts model.embed_tokens"),
        (
            {"modules_to_save": ["norm"]},
            "can be merged but not served: it stores model.layers.0.input_layernorm.weight whole",
        ),
        ({}, None),
    ],
)
def test_adapters_that_not_all_of_the_toolkit_reads_are_told(options, message, base, data, tmp_path):
    spec = spec_of(base, data, max_steps=1)
    spec["adapter"] = spec["adapter"] | options
    warning = train(spec, tmp_path / "out", quiet=True).numbers.get("warning")
    assert warning is None if message is None else re.search(message, warning), warning


def test_metrics_reach_tensorboard(base, data, tmp_path):
    result = train(spec_of(base, data), tmp_path / "out", quiet=True)
    (file,) = (result.path / "tensorboard").glob("events*")
    tags, raw, at = set(), file.read_bytes(), 0
    while at < len(raw):  # a record is: length (8 bytes), its checksum (4), the event, its checksum (4)
        length = int.from_bytes(raw[at : at + 8], "little")
        event = Event.FromString(raw[at + 12 : at + 12 + length])
        tags |= {value.tag for value in event.summary.value}
        at += 16 + length
    assert {"train/loss", "eval/loss", "train/learning_rate"} <= tags


def test_bad_rows_stop_the_run_before_it_begins(base, data, tmp_path):
    write_rows(tmp_path / "bad.jsonl", [{"prompt": "x", "completion": "y"}, {"prompt": "x", "completion": ""}])
    spec = spec_of(base, data)
    spec["data"] = {"train": str(tmp_path / "bad.jsonl")}
    with pytest.raises(DataError, match=r"bad\.jsonl:2: no token of this row is trained; set data\.empty to skip"):
        train(spec, tmp_path / "out", quiet=True)
    assert [p.name for p in tmp_path.glob("*out*")] == []
    spec["data"] |= {"empty": "skip"}
    assert train(spec, tmp_path / "out", quiet=True).numbers["data"]["skipped"] == {"empty": 1}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"adapter": {"method": "lora", "lora_alhpa": 3}},
            "adapter.lora_alhpa: lora has no field 'lora_alhpa'; did you mean 'lora_alpha'?",
        ),
        ({"adapter": {"method": "lora", "r": "four"}}, "adapter.r: Input should be a valid integer"),
        ({"adapter": {"method": "lora", "target_modules": ["nothing"]}}, "adapter: "),
        ({"adapter": {"method": "lora", "r": 0}}, "adapter: "),
        (
            {"adapter": {"method": "prefix_tunning"}},
            "adapter.method: no method 'prefix_tunning'; did you mean 'prefix_tuning'? (known: full, adalora, ",
        ),
        ({"training": {"learning_rate": -1}}, "training.learning_rate: Input should be greater than 0"),
        (
            {"training": {"warmup_ratio": 0.1}},
            "training.warmup_ratio: unknown key 'warmup_ratio'; did you mean 'warmup_steps'?",
        ),
        (
            {"training": {"early_stopping_patience": 2}, "data": {"train": "x"}},
            "early_stopping_patience needs data.validation",
        ),
        ({"initialize": "random"}, "initialize: random needs adapter.method: full"),
        ({"out": None}, "out: required"),
        ({"training": {"optimizer": "adamw_trch"}}, "training.optimizer: no optimizer 'adamw_trch'; did you mean"),
        ({"training": {"optimizer": "lomo"}}, "training.optimizer: lomo cannot be used here"),
        (
            {"training": {"report_to": ["tensorboard", "trackio"]}},
            "training.report_to[1]: trackio is not installed; pip install trackio, or leave it out",
        ),
        ({"adapter": {"rank_pattern": {"(": 4}}}, "adapter.rank_pattern: '(' is not a regular expression"),
        ({"adapter": {"rank_pattern": {"up_proj": "x"}}}, "adapter.rank_pattern: 'up_proj': expected a number above 0"),
        ({"adapter": {"target_modules": "*_proj"}}, "adapter.target_modules: '*_proj' is not a regular expression"),
        ({"adapter": {"init_lora_weights": "pissa"}}, "adapter.init_lora_weights: pissa changes the base"),
        ({"adapter": {"init_lora_weights": "olora"}}, "adapter.init_lora_weights: olora changes the base"),
        ({"adapter": {"lora_alpha": 0}}, "adapter.lora_alpha: expected a number above 0, got 0"),
        ({"adapter": {"method": "full", "r": 4}}, "adapter.r: full has no field 'r'"),
    ],
)
def test_bad_specs(change, message, base, data, tmp_path):
    spec = spec_of(base, data) | {"out": str(tmp_path / "out")} | change
    with pytest.raises(SpecError) as caught:
        train(spec, quiet=True)
    assert message in str(caught.value)
    assert list(tmp_path.iterdir()) == [] or not (tmp_path / "out").exists()


def test_faults_are_told_together_and_before_the_base_is_looked_for(data, tmp_path):
    spec = spec_of(tmp_path / "absent", data, optimizer="bogus") | {"adapter": {"lora_aplha": 3}}
    with pytest.raises(SpecError) as caught:
        train(spec, quiet=True)
    assert [p.where for p in caught.value.problems] == ["adapter.lora_aplha", "training.optimizer", "out"]


def test_every_field_of_the_config_is_peft_own():
    config, problems = peft_config(AdapterSpec(method="lora", r=3, target_modules=["q_proj"], lora_dropout=0.1))
    assert not problems
    ours = {k: v for k, v in config.to_dict().items() if k not in ("peft_version", "auto_mapping")}
    theirs = LoraConfig(r=3, target_modules=["q_proj"], lora_dropout=0.1, task_type="CAUSAL_LM").to_dict()
    assert ours == {k: v for k, v in theirs.items() if k in ours}


def test_model_objects_train_as_well(base, data, tmp_path):
    loaded = toolkit.load_model(base)
    before = {name: value.clone() for name, value in loaded.model.state_dict().items()}
    kinds = [type(module) for module in loaded.model.modules()]
    loaded.model.model.layers[0].train()
    modes = [module.training for module in loaded.model.modules()]
    spec = spec_of(base, data, max_steps=2, gradient_checkpointing=True) | {"base": (loaded.model, loaded.tokenizer)}
    result = train(spec, tmp_path / "out", quiet=True)
    assert open_adapter(result.path).base_model == str(base)
    assert [type(module) for module in loaded.model.modules()] == kinds
    after = loaded.model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert all(value.requires_grad for value in loaded.model.parameters())
    assert loaded.model.config.use_cache
    assert [module.training for module in loaded.model.modules()] == modes
    assert not any(getattr(module, "gradient_checkpointing", False) for module in loaded.model.modules())


def test_interrupt_leaves_no_half_adapter(base, data, tmp_path):
    path = tmp_path / "spec.yaml"
    path.write_text(yaml.safe_dump(spec_of(base, data, max_steps=100000)))
    process = subprocess.Popen(
        [sys.executable, "-m", "toolkit", "train", path, tmp_path / "out"], stderr=subprocess.PIPE, env=dict(os.environ)
    )
    while not (tmp_path / ".out.partial" / METRICS).is_file() or not metrics(tmp_path / ".out.partial"):
        time.sleep(0.05)
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, shown = process.communicate(timeout=60)
    assert process.returncode == 130
    assert b"Traceback" not in shown
    assert not (tmp_path / "out").exists()
