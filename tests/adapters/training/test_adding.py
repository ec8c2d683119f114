"""The method of docs/training.md works where the document says; the document names every method and objective."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import toolkit.adapters.training
from toolkit.adapters.parts import OBJECTIVES, TRAINING
from toolkit.adapters.train import train
from toolkit.data.rows import write_rows
from toolkit.names import available

ROOT = Path(__file__).parents[3]
TEXT = (ROOT / "docs" / "training.md").read_text()
((NAME, SOURCE),) = re.findall(r"^```py\n# (\S+)\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)


def test_documented_method_trains(base, tmp_path, monkeypatch):
    (tmp_path / "methods").mkdir()
    (tmp_path / "methods" / Path(NAME).name).write_text(SOURCE)
    monkeypatch.setattr(
        toolkit.adapters.training, "__path__", [*toolkit.adapters.training.__path__, str(tmp_path / "methods")]
    )
    write_rows(tmp_path / "rows.jsonl", [{"prompt": f"{i} ", "completion": "yes"} for i in range(8)])
    files = []
    for i, methods in enumerate([(), {"method": "neftune", "alpha": 0}, "neftune"]):
        training = {"max_steps": 3, "batch_size": 4, "learning_rate": 0.01, "methods": methods}
        spec = {"base": str(base), "data": {"train": str(tmp_path / "rows.jsonl")}, "training": training}
        folder = train(spec | {"device": "cpu"}, tmp_path / str(i), quiet=True).path
        files.append((folder / "adapter_model.safetensors").read_bytes())
    assert files[0] == files[1] != files[2]
    sys.modules.pop("toolkit.adapters.training.neftune")


def test_documented_file_is_clean():
    for command in (["format", "--check"], ["check"]):
        words = [sys.executable, "-m", "ruff", *command, "--stdin-filename", NAME, "-"]
        run = subprocess.run(words, input=SOURCE, capture_output=True, text=True, cwd=ROOT)
        assert run.returncode == 0, run.stdout + run.stderr


@pytest.mark.parametrize("package", [OBJECTIVES, TRAINING])
def test_document_names_all(package):
    for name in available(package):
        assert f"| `{name}` |" in TEXT, f"docs/training.md has no row for {name}"
