"""A checkpoint in the background is an ordinary one, to the byte, although training went on."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from toolkit.adapters.loop import AdapterTrainer
from toolkit.adapters.train import train
from toolkit.adapters.training import datastates
from toolkit.checkpoints.writer import staging_path
from toolkit.data.rows import write_rows
from toolkit.errors import SpecError


def spec_of(base, tmp_path, method="lora", methods: Any = "datastates", **training) -> dict:
    rows = [{"prompt": f"{i} ", "completion": "abc" * (1 + i % 3)} for i in range(16)]
    if not (tmp_path / "a.jsonl").exists():
        write_rows(tmp_path / "a.jsonl", rows)
    settings = {"max_steps": 6, "batch_size": 4, "learning_rate": 0.01, "save_steps": 2, "save_total_limit": 2}
    adapter = {"method": method} | ({"lora_dropout": 0.1} if method == "lora" else {})
    spec = {"base": str(base), "adapter": adapter, "data": {"train": str(tmp_path / "a.jsonl")}, "device": "cpu"}
    return spec | {"training": settings | {"methods": methods, "keep_checkpoints": True} | training}


def files(folder: Path) -> dict[str, bytes]:
    found = {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
    # Methods' own state, and the trainer's settings, which name the folder.
    return {k: v for k, v in found.items() if not k.endswith(("methods.pt", "training_args.bin"))}


@pytest.mark.system("datastates")
@pytest.mark.parametrize("method", ["lora", "full"])
def test_files_are_those_of_ordinary_checkpoints(base, tmp_path, method):
    plain = train(spec_of(base, tmp_path, method, ()), tmp_path / "plain", quiet=True).path
    background = train(spec_of(base, tmp_path, method), tmp_path / "background", quiet=True).path
    wanted, found = files(plain / "checkpoints"), files(background / "checkpoints")
    assert {name.split("/")[0] for name in wanted} == {"checkpoint-4", "checkpoint-6"}
    assert found.keys() == wanted.keys(), "and the oldest one is gone"
    assert [name for name in wanted if found[name] != wanted[name] and "trainer_state" not in name] == []


@pytest.mark.system("datastates")
def test_steps_wait_for_the_copy_but_not_for_the_disk(base, tmp_path, monkeypatch):
    """Every wait below ends only if training goes on beside it."""
    events: list[str] = []
    computed = {step: threading.Event() for step in range(5)}
    old_copy, old_write = datastates._copied, datastates._written
    old_step, old_optimize = AdapterTrainer.training_step, torch.optim.AdamW.step

    def copy(writes, ready):
        if "copied" not in events:
            assert computed[2].wait(20), "the copy goes on while the next batch is computed"
        found = old_copy(writes, ready)
        events.append("copied")
        return found

    def write(copied, place, limit):
        if "written" not in events:
            assert computed[3].wait(20), "and the file is written while later steps are taken"
        old_write(copied, place, limit)
        events.append("written")

    def step(self, *args):
        loss = old_step(self, *args)
        events.append(f"computed {self.state.global_step}")
        computed[self.state.global_step].set()
        return loss

    def optimize(self, *args, **kwargs):
        events.append("optimized")
        return old_optimize(self, *args, **kwargs)

    monkeypatch.setattr(datastates, "_copied", copy)
    monkeypatch.setattr(datastates, "_written", write)
    monkeypatch.setattr(AdapterTrainer, "training_step", step)
    monkeypatch.setattr(torch.optim.AdamW, "step", optimize)
    spec = spec_of(base, tmp_path, max_steps=5, save_total_limit=5)
    made = train(spec, tmp_path / "out", quiet=True).path
    third = events.index("optimized", events.index("computed 2"))
    assert events.index("computed 2") < events.index("copied") < third
    assert events.index("written") > events.index("computed 3")
    second = events.index("copied", events.index("copied") + 1)
    assert second > events.index("written"), "at most one copy is held"
    assert events.count("written") == 3, "of steps 2, 4 and the last"
    spec["training"]["methods"] = ()
    plain = train(spec, tmp_path / "plain", quiet=True).path
    for name in ("adapter_model.safetensors", "optimizer.pt", "trained.pt", "rng_state.pth"):
        a, b = (folder / "checkpoints" / "checkpoint-2" / name for folder in (made, plain))
        assert a.read_bytes() == b.read_bytes(), "although steps were taken before it was written"


KILLED = """
import os, sys, yaml
from toolkit.adapters.train import train
from toolkit.adapters.training import datastates
spec = yaml.safe_load(open(sys.argv[1]))
old, calls = datastates._written, []
def die(copied, place, limit):
    calls.append(1)
    if len(calls) < 2:
        return old(copied, place, limit)
    writer, values, path, options = copied.result()[0]
    writer(values, path, **options)
    os._exit(9)
datastates._written = die
train(spec, sys.argv[2], quiet=True)
"""


@pytest.mark.system("datastates")
def test_a_kill_in_the_midst_of_writing_leaves_the_one_before(base, tmp_path):
    import yaml

    spec = spec_of(base, tmp_path)
    done = train(spec, tmp_path / "done", quiet=True)
    (tmp_path / "spec.yaml").write_text(yaml.safe_dump(spec))
    code = [sys.executable, "-c", KILLED, tmp_path / "spec.yaml", tmp_path / "killed"]
    run = subprocess.run(code, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert run.returncode == 9, run.stderr
    left = sorted(p.name for p in (staging_path(tmp_path / "killed") / "checkpoints").iterdir())
    assert left == ["checkpoint-2", "saving"]
    again = train(spec, tmp_path / "killed", resume=True, quiet=True)
    name = "adapter_model.safetensors"
    assert (again.path / name).read_bytes() == (done.path / name).read_bytes()
    assert sorted(p.name for p in (again.path / "checkpoints").iterdir()) == ["checkpoint-4", "checkpoint-6"]


@pytest.mark.system("datastates")
def test_a_full_disk_stops_the_run(base, tmp_path, monkeypatch):
    def full(copied, place, limit):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(datastates, "_written", full)
    with pytest.raises(OSError, match="No space left"):
        train(spec_of(base, tmp_path), tmp_path / "out", quiet=True)
    assert torch.save.__module__ == "torch.serialization"


def test_what_needs_a_checkpoint_at_once_is_refused(base, tmp_path):
    spec = spec_of(base, tmp_path, save_steps=None, early_stopping_patience=2)
    spec["data"]["validation"] = spec["data"]["train"]
    with pytest.raises(SpecError) as error:
        train(spec, tmp_path / "out", quiet=True)
    assert "datastates writes checkpoints in the background" in str(error.value)
    assert "datastates has no best checkpoint" in str(error.value)
