"""Imports run one way, and what is light stays light."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "toolkit"

ORDER = (
    "cli jobs serving routing adapters merge evaluation models data kernels embedded checkpoints progress tables specs"
    " names errors"
).split()
"""A package may import only from itself and from those after it."""

ONLY_IN = {
    "fastapi": ["serving/server.py", "serving/http/", "serving/replicas/ray_serve.py"],
    "starlette": ["serving/http/", "serving/replicas/"],
    "prometheus_client": ["serving/http/metrics.py"],
    "llguidance": ["serving/guided.py"],
    "ray": ["serving/replicas/ray_serve.py"],
    "uvicorn": ["serving/serve.py"],
    "httpx": ["jobs/client.py", "jobs/bench_serve/drive.py", "jobs/bench_serve/run.py", "routing/endpoint.py"],
    "typer": ["cli/"],
    "matplotlib": [
        "jobs/plots.py",
        "jobs/bench_serve/plot.py",
        "jobs/inspect.py",
        "jobs/route_plot.py",
        "adapters/plots.py",
    ],
    "datasets": ["data/formats.py"],
    "pyarrow": ["data/formats.py"],
    "cmaes": ["jobs/search/methods.py", "merge/learning/evolve.py"],
    "scipy": ["adapters/methods/lq_lora.py", "merge/align/", "routing/"],
    "peft": ["adapters/"],
    "triton": ["kernels/"],
    "accelerate": ["adapters/"],
    "tensorboardX": ["adapters/callbacks.py"],
}

LIGHT = ["toolkit", "toolkit.cli", "toolkit.merge.run", "toolkit.merge.lowrank", "toolkit.checkpoints.companions"]
LIGHT += ["toolkit.specs", "toolkit.data.rows", "toolkit.jobs.recipe", "toolkit.jobs.inspect", "toolkit.jobs.skills"]


def imports(path: Path) -> list[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found += (
                [node.module or ""] if node.module != "toolkit" else [f"toolkit.{alias.name}" for alias in node.names]
            )
    return found


FILES = sorted(path for path in ROOT.rglob("*.py") if path.parent != ROOT)
FILES += [ROOT / f"{name}.py" for name in ORDER if (ROOT / f"{name}.py").is_file()]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_run_one_way(path):
    place = ORDER.index(path.relative_to(ROOT).parts[0].removesuffix(".py"))
    for name in imports(path):
        parts = name.split(".")
        if parts[0] == "toolkit":
            assert ORDER.index(parts[1]) >= place, f"{path.relative_to(ROOT)} must not import {name}"
        for allowed in [ONLY_IN[parts[0]]] if parts[0] in ONLY_IN else []:
            relative = str(path.relative_to(ROOT))
            assert any(relative.startswith(where) for where in allowed), f"{relative} must not import {parts[0]}"


def test_every_package_has_its_place_in_the_order():
    packages = {p.name for p in ROOT.iterdir() if (p / "__init__.py").is_file()}
    modules = {p.stem for p in ROOT.glob("*.py")} - {"__init__", "__main__"}
    assert packages | modules == set(ORDER)


@pytest.mark.parametrize("module", LIGHT)
def test_light_modules_import_neither_torch_nor_transformers(module):
    code = f"import sys, {module}; print([m for m in ('torch', 'transformers', 'peft') if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_help_is_fast_and_light():
    code = "import sys; from toolkit.cli import main; main(['--help']); assert 'torch' not in sys.modules"
    seconds = []
    for _ in range(3):
        before = os.times()
        run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        after = os.times()
        seconds.append(after.children_user + after.children_system - before.children_user - before.children_system)
        assert "quickstart" in run.stdout
    assert min(seconds) < 0.5, f"{min(seconds):.2f} CPU seconds"
