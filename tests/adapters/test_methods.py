"""Every method that PEFT has is trained from a spec, and stock PEFT reads what came of it."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

import toolkit
from toolkit.adapters import catalogue
from toolkit.adapters.callbacks import ShowProgress
from toolkit.adapters.runs import METRICS
from toolkit.adapters.train import train
from toolkit.data.rows import write_rows
from toolkit.errors import DataError, SpecError
from toolkit.models.load import quiet_transformers

pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{message}")
    for message in (
        "Failed to load the CUDA extension",  # boft; it has another way
        "Setting boft_n_butterfly_factor to 1",
        "Detected that the base layer has no bias term",  # beft
        "Unsupported layer type",  # ln_tuning; it knows others than RMS norms
        "Sparse invariant checks are implicitly disabled",  # frod
        "The following rank_pattern keys did not match",  # adalora; they do
    )
]

FIELDS: dict[str, dict[str, Any]] = {
    "adalora": {"init_r": 4, "target_r": 2},
    "adamss": {"r": 16, "num_subspaces": 3},
    "adaption_prompt": {"adapter_len": 4, "adapter_layers": 2},
    "c3a": {"block_size": 12},
    "cartridge": {"num_virtual_tokens": 4},
    "cpt": {"cpt_token_ids": [65, 66, 67], "cpt_tokens_type_mask": [1, 2, 4]},
    "multitask_prompt_tuning": {"num_virtual_tokens": 4},
    "miss": {"r": 4},
    "oft": {"oft_block_size": 12},
    "p_tuning": {"num_virtual_tokens": 4, "encoder_hidden_size": 16},
    "prefix_tuning": {"num_virtual_tokens": 4},
    "prompt_tuning": {"num_virtual_tokens": 4},
    "psoft": {"r": 8},
    "road": {"group_size": 12},
    "shira": {"r": 4},
    "trainable_tokens": {"token_indices": [110, 117]},
    "vblora": {"vector_length": 12, "num_vectors": 16},
    "waveft": {"n_frequency": 100},
}
"""Fields that a method cannot do without, or whose defaults are too large for a model of width 48."""


def peft_methods() -> list[str]:
    """Name the methods that come with PEFT itself."""
    found = {name: catalogue.find(name) for name in catalogue.names()}
    return [name for name, method in found.items() if method and method.config.__module__.startswith("peft.")]


METHODS = peft_methods()
VIRTUAL = [name for name in METHODS if (found := catalogue.find(name)) and found.virtual_tokens]
ALONE = [*VIRTUAL, "lily"]
"""Those that cannot have packed rows: PEFT's Lily weights its experts by a mean over all tokens of a batch."""


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    rows = [{"prompt": f"number {i} is ", "completion": str(i * 7 % 10)} for i in range(20)]
    write_rows(folder / "train.jsonl", rows[:14])
    write_rows(folder / "validation.jsonl", rows[14:])
    return folder


@pytest.fixture
def spec(base, data, loras):
    def make(method: str, **training: Any) -> dict[str, Any]:
        fields = FIELDS.get(method, {})
        if method == "xlora":
            fields = {"adapters": {"0": str(loras["plain"]), "1": str(loras["few"])}, "xlora_size": 8}
        return {
            "base": str(base),
            "adapter": {"method": method, **fields},
            "data": {
                "train": str(data / "train.jsonl"),
                "validation": str(data / "validation.jsonl"),
                "packing": method not in ALONE,
                "max_length": 70,
            },
            "training": {"max_steps": 3, "batch_size": 3, "learning_rate": 1e-2, "logging_steps": 1} | training,
            "device": "cpu",
        }

    return make


def reloaded(base: Path, adapter: Path) -> PeftModel:
    """Read an adapter as PEFT's documentation says to."""
    with quiet_transformers():
        model = AutoModelForCausalLM.from_pretrained(base)
        model.config.use_cache = False  # X-LoRA insists
        return PeftModel.from_pretrained(model, str(adapter)).eval()


def logits_of(model: Any, ids: list[int], method: str) -> torch.Tensor:
    """Return `[T, N]`, without the virtual tokens that stand before a row."""
    found = catalogue.find(method)
    tasks = {"task_ids": torch.tensor([0])} if found and found.task_field else {}
    with torch.inference_mode():
        return model(input_ids=torch.tensor([ids]), **tasks).logits[0, -len(ids) :]


def loss_by_hand(model: Any, method: str, data: Path, base: Path) -> float:
    """Return the mean loss of the completions, each row alone."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    total, count = 0.0, 0
    for line in (data / "validation.jsonl").read_text().splitlines():
        row = json.loads(line)
        asked = tokenizer.encode(row["prompt"])
        ids = asked + tokenizer.encode(row["completion"]) + [tokenizer.eos_token_id]
        logits = logits_of(model, ids, method)
        total += cross_entropy(logits[len(asked) - 1 : -1], torch.tensor(ids[len(asked) :]), reduction="sum").item()
        count += len(ids) - len(asked)
    return total / count


def test_peft_has_the_methods_that_are_tested_here():
    assert len(METHODS) == 45


@pytest.mark.parametrize("method", METHODS)
def test_stock_peft_reloads_what_was_trained(method, spec, base, data, tmp_path, monkeypatch):
    kept: dict[str, torch.Tensor] = {}
    ids = [110, 117, 109, 98, 101, 114, 32, 55]

    def save(spec, loaded, folder):
        kept["trained"] = logits_of(loaded.model.eval(), ids, method)
        own_save(spec, loaded, folder)

    from toolkit.adapters import trainee

    own_save = trainee.save
    monkeypatch.setattr(trainee, "save", save)
    described = spec(method, batch_size=1) if method == "lily" else spec(method)
    result = train(described, tmp_path / "out", quiet=True)
    model = reloaded(base, result.path)
    torch.testing.assert_close(logits_of(model, ids, method), kept["trained"], rtol=1e-5, atol=1e-5)
    with quiet_transformers():
        plain = AutoModelForCausalLM.from_pretrained(base)
    assert (kept["trained"] - logits_of(plain, ids, "full")).abs().max() > 1e-3
    assert result.numbers["eval_loss"] == pytest.approx(loss_by_hand(model, method, data, base), rel=1e-5)


class StopError(Exception):
    """Ends a run as a kill does: what is on the disk stays there."""


QUICK = ["adalora", "ia3", "p_tuning", "xlora"]


@pytest.mark.parametrize("method", [m if m in QUICK else pytest.param(m, marks=pytest.mark.slow) for m in METHODS])
def test_resumed_run_ends_with_the_bytes_of_the_undisturbed_one(method, spec, tmp_path, monkeypatch):
    described = spec(method, save_steps=2, max_steps=4)
    undisturbed = train(described, tmp_path / "undisturbed", quiet=True)

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 3:
            raise StopError

    with monkeypatch.context() as patched:
        patched.setattr(ShowProgress, "on_step_end", on_step_end)
        with pytest.raises(StopError):
            train(described, tmp_path / "out", quiet=True)
    resumed = train(described, tmp_path / "out", resume=True, quiet=True)
    name = "adapter_model.safetensors"
    assert (resumed.path / name).read_bytes() == (undisturbed.path / name).read_bytes()
    assert resumed.numbers["eval_loss"] == undisturbed.numbers["eval_loss"]


@pytest.mark.parametrize("method", [m if m in QUICK else pytest.param(m, marks=pytest.mark.slow) for m in METHODS])
def test_model_in_memory_is_given_back_as_it_was(method, spec, base, tmp_path):
    loaded = toolkit.load_model(base)
    before = {name: value.clone() for name, value in loaded.model.state_dict().items()}
    kinds = [type(module) for module in loaded.model.modules()]
    logits = logits_of(loaded.model, [1, 2, 3], "full")
    described = spec(method) | {"base": (loaded.model, loaded.tokenizer)}
    train(described, tmp_path / "out", quiet=True)
    after = loaded.model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert [type(module) for module in loaded.model.modules()] == kinds
    assert all(value.requires_grad for value in loaded.model.parameters())
    assert loaded.model.config.use_cache
    assert torch.equal(logits_of(loaded.model, [1, 2, 3], "full"), logits)


@pytest.mark.parametrize("accumulated", [1, 2])
@pytest.mark.parametrize("method", [*VIRTUAL, "ln_tuning"])
def test_loss_in_training_is_that_of_the_completions(method, accumulated, spec, base, data, tmp_path):
    """At a rate of next to nothing the adapter stays what it was at the first step, whose loss is logged."""
    rhythm = {"batch_size": 6 // accumulated, "gradient_accumulation_steps": accumulated}
    described = spec(method, max_steps=1, learning_rate=1e-12, **rhythm)
    described["data"] |= {"train": described["data"]["validation"], "packing": False}
    result = train(described, tmp_path / "out", quiet=True)
    (first,) = [e["loss"] for e in map(json.loads, (result.path / METRICS).read_text().splitlines()) if "loss" in e]
    model = reloaded(base, result.path)
    by_hand = loss_by_hand(model, method, data, base)
    if method == "cpt":  # it trains the answer of its context, too; a completion here has two tokens
        with torch.inference_mode():
            logits = model(input_ids=torch.tensor([[0]])).logits[0, 1]
        by_hand = (2 * by_hand + cross_entropy(logits, torch.tensor(67)).item()) / 3
    assert first == pytest.approx(by_hand, rel=1e-4)


@pytest.mark.parametrize(
    ("method", "fields"), [("p_tuning", {}), ("prefix_tuning", {"prefix_projection": True, "encoder_hidden_size": 8})]
)
def test_best_step_of_a_reparametrised_prompt_is_the_result(method, fields, spec, base, data, tmp_path):
    """PEFT's own checkpoint holds what the network puts out, which is no input of it."""
    described = spec(method, max_steps=60, learning_rate=0.5, eval_steps=1, early_stopping_patience=2)
    described["adapter"] |= fields
    result = train(described, tmp_path / "out", quiet=True)
    losses = [
        e["eval_loss"] for e in map(json.loads, (result.path / METRICS).read_text().splitlines()) if "eval_loss" in e
    ]
    assert losses[-1] > min(losses)
    assert loss_by_hand(reloaded(base, result.path), method, data, base) == pytest.approx(min(losses), rel=1e-4)


@pytest.mark.parametrize("layers", [[1], [0, -1]])
def test_full_training_of_some_layers_leaves_the_others(layers, spec, base, tmp_path):
    result = train(spec("full") | {"adapter": {"method": "full", "layers": layers}}, tmp_path / "out", quiet=True)
    start = AutoModelForCausalLM.from_pretrained(base).state_dict()
    after = AutoModelForCausalLM.from_pretrained(result.path).state_dict()
    changed = {name for name in start if not torch.equal(after[name], start[name])}
    expected = {name for name in start if any(f"layers.{layer % 3}." in name for layer in layers)}
    assert changed == expected
    assert result.numbers["trainable_parameters"] == sum(start[name].numel() for name in expected)


@pytest.mark.parametrize("method", ["lora", "vera", "boft"])
def test_adapter_on_some_layers_is_on_those_alone(method, spec, tmp_path):
    described = spec(method)
    described["adapter"]["layers"] = [0, -1]
    tensors = load_file(train(described, tmp_path / "out", quiet=True).path / "adapter_model.safetensors")
    found = {int(match[1]) for name in tensors if (match := re.search(r"layers\.(\d+)\.", name))}
    assert found == {0, 2}


PROMPT = {"method": "prompt_tuning", "num_virtual_tokens": 4}
PREFIX = {"method": "prefix_tuning", "num_virtual_tokens": 4}


@pytest.mark.parametrize(
    ("adapter", "change", "message"),
    [
        (PROMPT, {"data": {"packing": True}}, "data.packing: prompt_tuning puts its virtual tokens before a whole row"),
        (
            PREFIX,
            {"training": {"gradient_checkpointing": True}},
            "training.gradient_checkpointing: prefix_tuning keeps",
        ),
        ({"method": "lily"}, {"data": {"packing": True}}, "data.packing: the model with lily does not keep packed"),
        ({"method": "lora", "alora_invocation_tokens": [3]}, {"data": {"packing": True}}, "data.packing: an activated"),
        ({"method": "prompt_tuning"}, {}, "adapter.num_virtual_tokens: required by prompt_tuning: how many vectors"),
        ({"method": "xlora"}, {}, "adapter.adapters: required by xlora: the trained LoRAs"),
        ({"method": "trainable_tokens"}, {}, "adapter.token_indices: required by trainable_tokens"),
        ({"method": "adalora", "init_r": 4, "target_r": 4}, {}, "adapter.init_r: expected more than target_r"),
        ({"method": "cpt", "cpt_token_ids": [1, 2]}, {}, "adapter.cpt_tokens_type_mask: expected one number per token"),
        ({"method": "vera", "vera_dropuot": 0.1}, {}, "vera has no field 'vera_dropuot'; did you mean 'vera_dropout'?"),
        ({"method": "vera", "r": "many"}, {}, "adapter.r: Input should be a valid integer"),
        ({"method": "ia3", "layers": [0]}, {}, "adapter.layers: ia3 cannot be put on some layers only"),
        ({"method": "lora", "layers": [3]}, {}, "adapter.layers: no layer 3; the model has 3"),
        ({"method": "full", "layers": [-4]}, {}, "adapter.layers: no layer -4; the model has 3"),
        ({"method": "lora", "layers": [0], "layers_to_transform": [0]}, {}, "says the same as layers_to_transform"),
        ({"method": "lora", "init_lora_weights": "eva"}, {}, "eva starts from the data"),
        ({"method": "shira", "r": 999}, {}, "adapter: PEFT refuses it: The set rank 999 results in more"),
    ],
)
def test_what_a_method_cannot_do_is_said_before_the_first_step(adapter, change, message, spec, tmp_path):
    described = spec("lora")
    described["data"]["packing"] = False
    described["adapter"] = adapter
    for key, value in change.items():
        described[key] |= value
    with pytest.raises(SpecError) as caught:
        train(described, tmp_path / "out", quiet=True)
    assert message in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_rows_leave_room_for_virtual_tokens(spec, tmp_path):
    write_rows(tmp_path / "long.jsonl", [{"text": "x" * 249}])
    described = spec("prompt_tuning")
    described["adapter"]["num_virtual_tokens"] = 6  # the model takes 256 tokens, and the end takes one
    described["data"] = {"train": str(tmp_path / "long.jsonl")}
    train(described, tmp_path / "fits", quiet=True)
    described["adapter"]["num_virtual_tokens"] = 7
    with pytest.raises(DataError, match=r"long\.jsonl:1: 250 tokens, but the model takes at most 249"):
        train(described, tmp_path / "out", quiet=True)


def test_adalora_ends_with_the_ranks_it_was_told(spec, tmp_path):
    """Each of the 21 linear layers starts with 4 ranks and is left 2 on average, whatever the number of steps."""
    described = spec("adalora", max_steps=12)
    described["adapter"]["tfinal"] = 2
    tensors = load_file(train(described, tmp_path / "out", quiet=True).path / "adapter_model.safetensors")
    assert sum(len(value) for name, value in tensors.items() if name.endswith("lora_E")) == 21 * 2


def test_table_in_the_documents_is_what_peft_says():
    place = Path(__file__).parent.parent.parent / "tools" / "adapter_methods_table.py"
    found = importlib.util.spec_from_file_location("adapter_methods_table", place)
    assert found
    assert found.loader
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    text = module.DOCUMENT.read_text(encoding="utf-8")
    assert text == module.written(text), "run python tools/adapter_methods_table.py"
    assert set(module.WHAT) == set(METHODS)
