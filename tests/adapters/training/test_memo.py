"""Activations that went to the host come back the same, and those computed again are the same; how many may go."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from scipy.optimize import linprog
from torch import Tensor

from benchmarks.allocated import held_bytes
from tests import tiny
from tests.adapters.training.test_lightseq import passes
from toolkit.adapters.train import train
from toolkit.adapters.training import _activations
from toolkit.adapters.training.memo import Costs, activations_elsewhere, best_fraction
from toolkit.data.rows import write_rows
from toolkit.errors import SpecError, UnsupportedError

ROWS, TOKENS, LAYERS = 2, 40, 3


def model_of(kind: str) -> Any:
    model = tiny.llama().double() if kind == "double" else tiny.llama()
    if kind == "lora":
        torch.manual_seed(1)
        options = {"r": 2, "target_modules": "all-linear", "init_lora_weights": False, "lora_dropout": 0.2}
        return get_peft_model(model, LoraConfig(**options)).train()
    return model.train()


def batch(kind: str = "") -> dict[str, Tensor]:
    ids = torch.randint(0, 250, (ROWS, TOKENS), generator=torch.Generator().manual_seed(0))
    found = {"input_ids": ids, "labels": ids, "use_cache": False}
    if kind == "packed":  # documents of several lengths, from which transformers makes a mask
        found["position_ids"] = torch.tensor([[*range(17), *range(23)], [*range(5), *range(30), *range(5)]])
    if kind == "padded":
        found["attention_mask"] = torch.ones(ROWS, TOKENS, dtype=torch.long)
        found["attention_mask"][1, 25:] = 0
    return found  # pyright: ignore[reportReturnType]


def gradients(model: Any, kind: str) -> list[Tensor]:
    model.zero_grad()
    torch.manual_seed(5)
    with torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast"):
        loss = model(**batch(kind)).loss
    loss.backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.system("memo")
@pytest.mark.parametrize("fraction", [0, 0.3, 1])
@pytest.mark.parametrize("tier", ["cpu", "disk"])
@pytest.mark.parametrize("kind", ["double", "lora", "packed", "padded", "autocast"])
def test_gradients_are_those_of_plain_training(tmp_path, kind, tier, fraction):
    model = model_of(kind)
    wanted = gradients(model, kind)
    with activations_elsewhere(model, fraction=fraction, folder=tmp_path if tier == "disk" else None) as offload:
        for _ in range(2):
            found = gradients(model, kind)
            assert len(found) == len(wanted)
            tolerance = {"double": 1e-13, "autocast": 2e-2}.get(kind, 2e-6)
            for a, b in zip(found, wanted, strict=True):
                torch.testing.assert_close(a, b, rtol=0, atol=tolerance * float(b.abs().max()))
        assert offload.host.held == 0, "all of it was dropped"
    assert not list(tmp_path.iterdir())


@pytest.mark.system("memo")
@pytest.mark.parametrize("fraction", [0, 0.3, 1])
def test_attention_never_runs_twice_and_the_model_comes_back(fraction):
    model = tiny.llama().train()
    plain = passes(model)
    with activations_elsewhere(model, fraction=fraction):
        placed = passes(model)
    assert placed[0] == 2 * LAYERS, "once for the batch, once for the two tokens of the probe"
    assert placed[1] == 0
    assert all(torch.allclose(a, b, rtol=0, atol=1e-5) for a, b in zip(placed[2], plain[2], strict=True))
    assert passes(model)[:2] == plain[:2]


def kept_by_plain_training(model: Any) -> int:
    """Return the bytes that the layers keep: storages that are saved while they compute, weights and angles apart."""
    apart = {p.untyped_storage().data_ptr() for p in model.parameters()}
    found: dict[int, Tensor] = {}
    inside = 0

    def pack(value: Tensor) -> Tensor:
        if inside and value.untyped_storage().data_ptr() not in apart and value.shape[:3] != (1, 1, TOKENS):
            found[value.untyped_storage().data_ptr()] = value
        return value

    def enter(*_: Any) -> None:
        nonlocal inside
        inside += 1

    def leave(*_: Any) -> None:
        nonlocal inside
        inside -= 1

    for layer in model.model.layers:
        layer.register_forward_pre_hook(enter)
        layer.register_forward_hook(leave)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        loss = model(**batch()).loss
    del loss
    return sum(value.untyped_storage().nbytes() for value in found.values())


ALWAYS = LAYERS * ROWS * TOKENS * 4 * (48 + 48 + 4)
"""Bytes of the input, the output of attention, and its sums for four heads, float32."""


@pytest.mark.system("memo")
@pytest.mark.parametrize("kept", [0, 1, 12, 39, 40])
def test_host_bytes_are_linear_in_the_tokens_that_are_kept(kept):
    everything = kept_by_plain_training(tiny.llama().train())
    model = tiny.llama().train()
    with activations_elsewhere(model, fraction=kept / TOKENS) as offload:
        loss = model(**batch()).loss
        assert offload.host.held == ALWAYS + (everything - ALWAYS) * kept // TOKENS
        del loss
        assert offload.host.held == 0


class AtOnce:
    """A thread that does its work when it gets it; torch's profiler does not see what other threads free."""

    def __init__(self, *_: Any) -> None:
        pass

    def submit(self, work: Callable[..., Any], *args: Any) -> Future[Any]:
        done: Future[Any] = Future()
        done.set_result(work(*args))
        return done

    def shutdown(self) -> None:
        pass


@pytest.mark.system("memo")
def test_device_bytes_are_those_of_what_did_not_go(tmp_path, monkeypatch):
    """With files as the host, and with memory, which counts as well on a CPU."""
    monkeypatch.setattr(_activations, "ThreadPoolExecutor", AtOnce)
    everything = kept_by_plain_training(tiny.llama().train())
    model = tiny.llama().train()

    def held(fraction: float, folder: Path | None) -> int:
        with activations_elsewhere(model, fraction=fraction, folder=folder):
            return held_bytes(lambda: model(**batch()).loss)

    plain = held_bytes(lambda: model(**batch()).loss)
    files = [held(fraction, tmp_path) for fraction in (0, 0.3, 1)]
    memory = [held(fraction, None) for fraction in (0, 0.3, 1)]
    states = LAYERS * torch.get_rng_state().nbytes
    last = ROWS * TOKENS * 48 * 4  # what leaves the last layer, and what enters the first, are others' as well
    assert max(files) - min(files) < 0.01 * plain
    assert files[0] == pytest.approx(plain - everything + states, abs=2 * last)
    wanted = [files[0] + ALWAYS + (everything - ALWAYS) * f for f in (0, 0.3, 1)]
    assert memory == [pytest.approx(w, abs=2 * last) for w in wanted]


@pytest.mark.system("memo")
def test_no_more_than_two_layers_wait_for_a_slow_host(monkeypatch):
    model = tiny.llama(num_hidden_layers=6).train()
    old, waiting = _activations.Host._move, []

    def slow(self: Any, value: Tensor, *args: Any) -> Any:
        time.sleep(0.005)
        return old(self, value, *args)

    monkeypatch.setattr(_activations.Host, "_move", slow)
    passes_: list[Any] = []
    forward = _activations.LayerPass.forward

    def watched(self: Any, hidden: Tensor) -> Tensor:
        out = forward(self, hidden)
        passes_.append(self)
        waiting.append(sum(any(not h.moved.done() for h in one.helds()) for one in passes_))
        return out

    monkeypatch.setattr(_activations.LayerPass, "forward", watched)
    with activations_elsewhere(model, fraction=0.5):
        model(**batch()).loss.backward()
    assert max(waiting) == 2


def allowed(fraction: float, costs: Costs, bandwidth: float, layers: int, tokens: int, limit: float) -> bool:
    size = costs.always + fraction * costs.rest
    return size / bandwidth <= costs.seconds and layers * tokens * size <= limit


@pytest.mark.system("memo")
def test_the_fraction_is_the_programmes_solution_and_the_best_of_all_tried():
    rng = np.random.default_rng(0)
    inner = 0
    for _ in range(200):
        always, rest, seconds, bandwidth, limit = rng.uniform(1, 10, 5)
        costs, layers, tokens = Costs(always, rest, seconds), int(rng.integers(1, 5)), int(rng.integers(1, 9))
        limit *= layers * tokens * 3
        found = best_fraction(costs, bandwidth=bandwidth, layers=layers, tokens=tokens, limit=limit)
        tried = [f for f in np.linspace(0, 1, 2001) if allowed(f, costs, bandwidth, layers, tokens, limit)]
        assert found == pytest.approx(max(tried, default=0), abs=1 / 2000)
        rows, most = [[rest / bandwidth], [layers * tokens * rest]], [seconds - always / bandwidth]
        programme = linprog([-1], rows, [*most, limit - layers * tokens * always], bounds=(0, 1))
        assert found == pytest.approx(programme.x[0] if programme.success else 0, abs=1e-9)
        inner += 0 < found < 1
    assert inner > 50, "neither end is all there is"


def run(base: Path, folder: Path, *, methods: Any, **training: Any) -> Any:
    rows = [{"prompt": f"{i} ", "completion": "abc" * (1 + i % 5)} for i in range(16)]
    if not (folder.parent / "a.jsonl").exists():
        write_rows(folder.parent / "a.jsonl", rows)
    options = {"max_steps": 4, "batch_size": 4, "learning_rate": 0.01, "report_to": [], "methods": methods}
    spec = {"base": str(base), "adapter": {"method": "lora", "lora_dropout": 0.2}, "device": "cpu"}
    return spec | {"data": {"train": str(folder.parent / "a.jsonl")}, "training": options | training}


@pytest.mark.system("memo")
@pytest.mark.parametrize("parameters", [{"fraction": 0.5}, {"tier": "disk", "host_memory": "300kB"}, {}])
def test_runs_take_the_same_steps(base, tmp_path, parameters):
    plain = train(run(base, tmp_path / "plain", methods=()), tmp_path / "plain", quiet=True)
    spec = run(base, tmp_path / "memo", methods={"method": "memo", **parameters})
    placed = train(spec, tmp_path / "memo", quiet=True)
    weights = [load_file(done.path / "adapter_model.safetensors") for done in (plain, placed)]
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, rtol=0, atol=1e-4 * float(value.abs().max()))
    told = json.loads((placed.path / "training.json").read_text())["memo"]
    assert 0 <= told["fraction"] <= 1
    assert told["fraction"] == parameters.get("fraction", told["fraction"])
    if "host_memory" in parameters:
        assert 0 < told["host_bytes"] <= 300_000


@pytest.mark.system("memo")
def test_a_limit_holds_for_longer_batches_too():
    model = tiny.llama().train()
    with activations_elsewhere(model, limit=400_000) as offload:
        for length in (20, 40, 80, 160):
            ids = torch.randint(0, 250, (1, length))
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
            offload.choose()
            if length == 20:
                assert offload.fraction == 1, "nothing is moved on a CPU, so nothing takes time"
                continue
            most, offload.host.most = offload.host.most, 0
            everything = length * LAYERS * (offload.costs.always + offload.costs.rest)  # pyright: ignore[reportOptionalMemberAccess]
            room = min(400_000, everything)
            a_token = LAYERS * offload.costs.rest  # pyright: ignore[reportOptionalMemberAccess]
            assert room - a_token < most <= room


@pytest.mark.system("memo")
def test_a_resumed_run_ends_with_the_same_bytes(base, tmp_path, monkeypatch):
    """The measured fraction is in the checkpoint: rounding depends on it."""
    spec = run(base, tmp_path / "whole", methods={"method": "memo", "host_memory": "200kB"}, save_steps=2)
    whole = train(spec, tmp_path / "whole", quiet=True).path / "adapter_model.safetensors"
    from toolkit.adapters.loop import AdapterTrainer

    old = AdapterTrainer.training_step

    def dies(self: Any, *args: Any) -> Tensor:
        if self.state.global_step == 3:
            raise KeyboardInterrupt
        return old(self, *args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(AdapterTrainer, "training_step", dies)
        train(spec, tmp_path / "again", quiet=True)
    again = train(spec, tmp_path / "again", resume=True, quiet=True).path / "adapter_model.safetensors"
    assert again.read_bytes() == whole.read_bytes()


def test_what_does_not_work_token_by_token_is_refused(base, tmp_path):
    spec = run(base, tmp_path / "out", methods=[{"method": "memo", "fraction": 0.5, "host_memory": 9}, "lightseq"])
    spec["training"]["gradient_checkpointing"] = True
    spec["adapter"] = {"method": "lily"}
    with pytest.raises(SpecError) as error:
        train(spec, tmp_path / "out", quiet=True)
    for part in (
        "memo goes with full, hra",
        "training.methods[0].host_memory: limits a fraction that is measured",
        "memo computes again what it needs",
        "lightseq needs layers that compute once",
    ):
        assert part in str(error.value)
    model = tiny.llama()
    model.set_attn_implementation("eager")
    with pytest.raises(UnsupportedError, match="memo needs a decoder of transformers with sdpa attention"):
        activations_elsewhere(model).__enter__()


def test_dropout_in_attention_is_refused():
    model = tiny.llama(attention_dropout=0.1).train()
    with activations_elsewhere(model, fraction=0.5), pytest.raises(UnsupportedError, match="no attention by a fused"):
        model(**batch())
