"""The method of docs/adding_an_adapter.md, written where the document says, keeps every law and passes its own test."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
DOCUMENT = ROOT / "docs" / "adding_an_adapter.md"

CONFTEST = """
import importlib.util, sys
import toolkit.adapters.methods
toolkit.adapters.methods.__path__.append({folder!r})
importlib.import_module("toolkit.adapters.methods.lora_xs")
spec = importlib.util.spec_from_file_location("tests.adapters.methods.test_lora_xs", {test!r})
sys.modules[spec.name] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sys.modules[spec.name])
"""
"""Makes the two files known as if they lay in the repository."""


def test_documented_method_keeps_every_law(tmp_path):
    blocks = re.findall(r"^```py\n# (\S+)\n(.*?)^```", DOCUMENT.read_text(), re.MULTILINE | re.DOTALL)
    files = dict(blocks)
    assert list(files) == ["toolkit/adapters/methods/lora_xs.py", "tests/adapters/methods/test_lora_xs.py"]
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text(text)
    method, test = (tmp_path / name for name in files)
    (test.parent / "conftest.py").write_text(CONFTEST.format(folder=str(method.parent), test=str(test)))
    words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "lora_xs"]
    words += ["tests/adapters/test_laws.py", str(test)]
    run = subprocess.run(words, capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0, run.stdout + run.stderr
    found = re.search(r"(\d+) passed", run.stdout)
    assert found
    assert int(found[1]) > 25


def test_documented_files_are_clean():
    for name, text in re.findall(r"^```py\n# (\S+)\n(.*?)^```", DOCUMENT.read_text(), re.MULTILINE | re.DOTALL):
        for command in (["format", "--check"], ["check", "--ignore", "I001"]):
            # ruff sorts imports by the files that are there, and these are not
            words = [sys.executable, "-m", "ruff", *command, "--stdin-filename", name, "-"]
            run = subprocess.run(words, input=text, capture_output=True, text=True, cwd=ROOT)
            assert run.returncode == 0, run.stdout + run.stderr
