"""Every recipe, every snippet of the documents and the notebook run, at reduced size."""

from __future__ import annotations

import importlib.util
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import nbformat
import pytest
from nbclient import NotebookClient

from toolkit.adapters.train import train
from toolkit.adapters.transfer.trans_lora import transfer
from toolkit.cli import main
from toolkit.jobs.evaluate import evaluate
from toolkit.jobs.quickstart import NEXT, quickstart
from toolkit.jobs.recipe import run_recipe
from toolkit.jobs.route import evaluate_router
from toolkit.jobs.search.run import search
from toolkit.merge.learning.learn import learn
from toolkit.merge.moe.build import build_moe
from toolkit.merge.run import merge
from toolkit.routing.compare import compare_routers
from toolkit.routing.fit import fit_router
from toolkit.routing.fusion.run import fuse_logits
from toolkit.routing.token.fit import fit_gates
from toolkit.serving.serve import open_engine
from toolkit.serving.spec import ServeSpec
from toolkit.specs import load

ROOT = Path(__file__).parent.parent
RECIPES = sorted((ROOT / "recipes").rglob("*.yaml"))
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
DOCUMENTS.remove(ROOT / "docs" / "tutorial.md")  # whose snippets go on from each other: tests/test_site.py


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Path:
    """A folder in which the quickstart ran, so small that its adapters know nothing."""
    folder = tmp_path_factory.mktemp("workplace")
    quickstart(folder / "quickstart", smoke=True, quiet=True)
    return folder


@pytest.fixture
def here(workplace, tmp_path, monkeypatch) -> Path:
    """A fresh folder with that quickstart and the recipes in it, which is the current one."""
    for name in ("quickstart", "recipes"):
        (tmp_path / name).symlink_to(workplace / name if name == "quickstart" else ROOT / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def serve_smoke(path: Path, out: Path) -> None:
    with open_engine(load(path, ServeSpec, smoke=True)) as engine:
        out.mkdir()
        assert engine.generate(["hello"], "auto" if engine.router else "base")[0].model in engine.models
        assert engine.generate(["hello"] * len(engine.models), engine.models)


def run_by_kind(path: Path, out: Path) -> None:
    kind = path.parent.name
    if kind == "serving":
        serve_smoke(path, out)
    elif path.name == "evaluate.yaml":
        evaluate_router(path, out, smoke=True, quiet=True)
    elif path.name == "gates.yaml":
        fit_gates(path, out, smoke=True, quiet=True)
    elif path.name == "fusion.yaml":
        fuse_logits(path, out, smoke=True, quiet=True)
    elif path.name.startswith("compare"):
        compare_routers(path, out, smoke=True, quiet=True)
    elif path.name.startswith("learn"):
        learn(path, out, smoke=True, quiet=True)
    elif path.name == "trans_lora.yaml":
        transfer(path, out, smoke=True, quiet=True)
    elif path.name in ("moe.yaml", "search.yaml"):
        {"moe.yaml": build_moe, "search.yaml": search}[path.name](path, out, smoke=True, quiet=True)
    else:
        jobs = {
            "merge": merge,
            "adapters": train,
            "routing": fit_router,
            "evaluation": evaluate,
            "reproduce": run_recipe,
        }
        jobs[kind](path, out, smoke=True, quiet=True)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: str(path.relative_to(ROOT / "recipes")))
def test_recipe_runs(path, here):
    run_by_kind(path.relative_to(ROOT), here / "out")
    assert (here / "out").is_dir()


def test_quickstart_leaves_what_it_says(workplace, here, capsys):
    folder = workplace / "quickstart"
    result = quickstart(folder, smoke=True, quiet=True)
    assert result.numbers["seconds"] == {}, "what is done is not done again"
    assert set(result.numbers["scores"]["base"]) == {"sort", "reverse", "upper", "pig_latin", "vowels", "brackets"}
    assert {"own adapter", "auto (router)", "ties: all six"} <= set(result.numbers["scores"])
    commands = [line.strip() for line in NEXT.format(out="quickstart").splitlines()[1:]]
    assert len(commands) == 3
    assert main(_words(commands[1])) == 0
    assert main([*_words(commands[2]), "--smoke", "--quiet"]) == 0
    check_server(_words(commands[0]))
    assert capsys.readouterr().out


def _words(command: str) -> list[str]:
    import shlex

    words = shlex.split(command)
    assert words[0] == "toolkit"
    return words[1:]


def check_server(arguments: list[str]) -> None:
    """Start a server as a user would, wait until it answers, stop it."""
    process = subprocess.Popen(
        [sys.executable, "-m", "toolkit", *arguments, "--port", "0"], stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stderr
        for line in process.stderr:
            if found := re.search(r"listening on (http://\S+)/v1", line):
                break
        for _ in range(100):
            try:
                assert httpx.get(f"{found[1]}/health", trust_env=False).status_code == 200
                break
            except httpx.TransportError:
                time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        process.stderr.read()
        assert process.wait(60) in (0, -signal.SIGTERM)
    finally:
        process.kill()
        process.stderr.close()


def snippets() -> list[tuple[str, str, str]]:
    found = []
    for path in DOCUMENTS:
        for i, match in enumerate(re.finditer(r"^```(\w+)\n(.*?)^```", path.read_text(), re.MULTILINE | re.DOTALL)):
            if match[1] in ("bash", "python"):
                found.append((f"{path.name}-{i}", match[1], match[2]))
    return found


SNIPPETS = snippets()


@pytest.mark.parametrize(("name", "language", "text"), SNIPPETS, ids=[name for name, _, _ in SNIPPETS])
def test_snippet_runs(name, language, text, here):
    """Run Python as it is; of shell blocks the toolkit's commands, small, and the server with a request to it."""
    if language == "python":
        environment = dict(os.environ, TOUR_STEPS="2")
        subprocess.run([sys.executable, "-c", text], check=True, env=environment)
        return
    ran = 0
    for line in text.replace("\\\n", " ").splitlines():
        line = line.split(" #")[0].strip()
        if line.startswith("toolkit serve"):
            arguments = [w for w in _words(line) if w != "&"]
            at = arguments.index("--port") if "--port" in arguments else len(arguments)
            check_server(arguments[:at] + arguments[at + 2 :])
        elif line.startswith("toolkit quickstart"):
            assert (here / "quickstart").is_dir()
        elif line.startswith("toolkit"):
            words = _words(line)
            whole = words[0] in ("adapters", "inspect", "skills", "extract") or "explain" in words
            smoke = [] if whole else ["--smoke"]
            assert main([*words, *smoke]) == 0, line
        else:
            assert line.startswith(("make ", "git ", "cd ", "curl ", "pip ", "#")) or not line, line
            continue
        ran += 1
    assert ran or "make" in text or "curl" in text


def test_table_of_merge_methods_is_what_their_files_say():
    spec = importlib.util.spec_from_file_location("methods_table", ROOT / "tools" / "methods_table.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    text = module.DOCUMENT.read_text(encoding="utf-8")
    assert text == module.written(text), "run python tools/methods_table.py"


@pytest.mark.parametrize(("name", "tables"), [("tour", 8), ("route", 12), ("merge", 6), ("train_serve", 7)])
def test_notebook(name, tables, here, monkeypatch):
    monkeypatch.setenv("TOUR_STEPS", "2")
    notebook = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells), "notebooks are committed without outputs"
    NotebookClient(notebook, timeout=300, kernel_name="python3").execute(cwd=str(here))
    shown = [o for c in notebook.cells for o in c.get("outputs", []) if "text/html" in o.get("data", {})]
    assert len(shown) >= tables, "results print as tables"
    drawn = [o for c in notebook.cells for o in c.get("outputs", []) if "image/png" in o.get("data", {})]
    assert bool(drawn) == (name != "tour")


def test_notebook_uses_every_public_function():
    import toolkit

    source = "".join(path.read_text() for path in sorted((ROOT / "notebooks").glob("*.ipynb")))
    unused = {n for n in toolkit.__all__ if n[0].islower() and f"toolkit.{n}(" not in source}
    assert unused <= {
        "align",
        "bench_serve",
        "calibrate_router",
        "compare_routers",
        "learn",
        "load_model",
        "load_router",
        "quickstart",
        "serve",
    }, unused
