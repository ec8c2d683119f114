"""Commands as users type them: what they print, how they end, and that a mistake is one clear line."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests import tiny
from toolkit.cli import main
from toolkit.data.rows import write_rows
from toolkit.errors import MissingError
from toolkit.tables import Report


@pytest.fixture
def run(capsys):
    def call(*arguments: object) -> tuple[int, str, str]:
        code = main([str(a) for a in arguments])
        shown = capsys.readouterr()
        assert "Traceback" not in shown.err
        return code, shown.out, shown.err

    return call


@pytest.fixture
def merge_spec(base, loras, tmp_path) -> Path:
    spec = {
        "merge_method": "task_arithmetic",
        "base_model": str(base),
        "models": [{"model": str(loras["plain"]), "parameters": {"weight": 0.5}}],
    }
    (tmp_path / "merge.yaml").write_text(yaml.safe_dump(spec))
    return tmp_path / "merge.yaml"


def test_help_lists_every_command(run):
    code, out, _ = run("--help")
    assert code == 0
    for command in ("quickstart", "train", "merge", "route", "serve", "evaluate", "inspect", "run", "skills"):
        assert command in out
    assert run("--version")[1].strip()
    assert run("route", "--help")[0] == 0


def test_a_command_imports_no_other():
    code = (
        "import sys; from toolkit.cli import main; main(['merge', '--help'])\n"
        "print(sorted(name for name in sys.modules if name.startswith('toolkit.cli.')))"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.splitlines()[-1] == "['toolkit.cli.common', 'toolkit.cli.merge']"


def test_merge(run, merge_spec, tmp_path):
    code, out, _ = run("merge", merge_spec, tmp_path / "out", "--quiet")
    assert code == 0
    assert "task_arithmetic" in out
    code, _, err = run("merge", merge_spec, tmp_path / "out", "--quiet")
    assert code == 1
    assert err.startswith("error: ")
    assert "exists already; name another folder, or pass --overwrite" in err
    code, out, _ = run(
        "merge", merge_spec, tmp_path / "out", "--quiet", "--overwrite", "--json", "--shard-size", "50kB"
    )
    assert json.loads(out)["method"] == "task_arithmetic"
    assert (tmp_path / "out" / "model.safetensors.index.json").is_file()


COMMON = "--lazy-unpickle --low-cpu-memory --read-to-gpu --multi-gpu --async-write --clone-tensors --allow-crimes"
VALUED = "--write-threads 2 --lora-merge-cache cache --lora-merge-dtype float32 --num-threads 1 --out-shard-size 5B"
"""mergekit's 5B are billions; of bytes, each tensor would be a file."""


def test_options_of_mergekit_change_nothing(run, merge_spec, tmp_path):
    assert run("merge", merge_spec, tmp_path / "plain", "-q")[0] == 0
    options = [*COMMON.split(), *VALUED.split(), "--safe-serialization", "--no-trust-remote-code", "-v"]
    assert run("merge", merge_spec, tmp_path / "out", "-q", *options)[0] == 0
    for file in ("model.safetensors", "merge.json"):
        assert (tmp_path / "out" / file).read_bytes() == (tmp_path / "plain" / file).read_bytes()
    code, _, err = run("merge", merge_spec, tmp_path / "no", "-q", "--no-safe-serialization")
    assert code == 2
    assert "weights are written as safetensors alone" in err


def test_merge_dry_run_prints_the_plan_and_writes_nothing(run, merge_spec, tmp_path):
    code, out, _ = run("merge", merge_spec, "--dry-run")
    assert code == 0
    assert "Plan" in out
    assert "weight 0.5; lambda 1" in out
    code, out, _ = run(
        "merge", merge_spec, tmp_path / "out", "--dry-run", "--json", "--set", "models[0].parameters.weight=0.25"
    )
    plan = json.loads(out)
    merged = [t for t in plan["tensors"] if t["action"] == "merge"]
    assert merged[0]["parameters"]["weight"] == [0.25]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["merge", "absent.yaml", "out"], 1, "error: absent.yaml: no such spec file"),
        (["merge", "SPEC"], 2, "name the folder to write"),
        (["merge", "SPEC", "out", "--shard-size", "big"], 2, "--shard-size 'big': not a size such as 20MB"),
        (["merge", "SPEC", "out", "--set", "nonsense"], 2, "override 'nonsense' is not of the form"),
        (["merge", "SPEC", "out", "--set", "models[7].model=x"], 2, "models[7] is not in the spec"),
        (["merge", "SPEC", "out", "--set", "densty=1"], 2, "densty: unknown key 'densty'"),
        (["merge", "SPEC", "out", "--set", "merge_method=tise"], 2, "did you mean 'ties'"),
        (["merge", "SPEC", "out", "--set", ".=1"], 2, "override '.=1' is not of the form key.path=value"),
        (["merge", "LATIN", "out"], 2, "latin.yaml: not UTF-8 text"),
        (["run", "STEP", "out"], 2, "a.train: expected a spec"),
        (["run", "STEPS", "merge.yaml"], 1, "error: merge.yaml: is a file; name a folder"),
        (["skills", ".", "--overwrite"], 1, "error: .: is the current folder, which cannot be replaced"),
        (["skills", "..", "--overwrite"], 1, "error: ..: holds the current folder"),
        (["nonsense"], 2, "No such command"),
        (["inspect", "/nowhere"], 1, "no such folder"),
        (["serve", "/nowhere", "--adapter", "x"], 2, "--adapter 'x' is not of the form name=path"),
        (["serve", "/nowhere", "--adapter", "a=x", "--adapter", "a=y"], 2, "the name 'a' is given twice"),
        (["route", "explain", "/nowhere", "x"], 1, "no such folder"),
    ],
)
def test_mistakes_are_one_line_and_an_exit_code(arguments, code, message, run, merge_spec, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "latin.yaml").write_bytes(b"merge_method: caf\xe9\n")
    (tmp_path / "step.yaml").write_text("steps: {a: {train: 5}}\n")
    (tmp_path / "steps.yaml").write_text("steps: {a: {skills: {train: 1, test: 1}}}\n")
    files = {"SPEC": merge_spec, "LATIN": "latin.yaml", "STEP": "step.yaml", "STEPS": "steps.yaml"}
    got, _, err = run(*[files.get(a, a) for a in arguments])
    assert got == code
    assert message in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected keys and values at the top level, got an empty file"),
        ("- a\n", "expected keys and values at the top level, got a list"),
        ("a: [1\n", "not valid YAML: line 2, column 1"),
        ("a: 1\na: 2\n", "line 2: a: key given twice"),
        ("models: []\n", "3 problems"),
    ],
)
def test_bad_yaml(text, message, run, tmp_path):
    (tmp_path / "spec.yaml").write_text(text)
    code, _, err = run("merge", tmp_path / "spec.yaml", tmp_path / "out")
    assert code == 2
    if message == "3 problems":
        message = "line 1: models: List should have at least 1 item"
    assert message in err
    assert "spec.yaml" in err


def test_train_route_evaluate_and_inspect(run, base, tmp_path):
    rows = [{"prompt": f"{i} ", "completion": "x"} for i in range(8)]
    write_rows(tmp_path / "a.jsonl", rows)
    write_rows(tmp_path / "b.jsonl", [{"prompt": f"words {i}", "completion": "y"} for i in range(8)])
    train = {
        "base": str(base),
        "data": {"train": str(tmp_path / "a.jsonl")},
        "training": {"max_steps": 2},
        "out": str(tmp_path / "lora"),
        "device": "cpu",
    }
    (tmp_path / "train.yaml").write_text(yaml.safe_dump(train))
    code, out, err = run("train", tmp_path / "train.yaml", "--set", "training.max_steps=1", "--json")
    assert json.loads(out)["steps"] == 1
    assert "training lora" in err
    route = {
        "experts": {"a": str(tmp_path / "a.jsonl"), "b": str(tmp_path / "b.jsonl")},
        "embedding": {"model": str(base)},
    }
    (tmp_path / "route.yaml").write_text(yaml.safe_dump(route))
    code, out, _ = run("route", "fit", tmp_path / "route.yaml", tmp_path / "router", "--quiet")
    assert code == 0
    assert "centroid" in out
    code, out, _ = run("route", "explain", tmp_path / "router", "words 3")
    assert "chosen" in out
    judged = {"router": str(tmp_path / "router"), "data": {"a": str(tmp_path / "a.jsonl")}}
    (tmp_path / "judge.yaml").write_text(yaml.safe_dump(judged))
    assert json.loads(run("route", "evaluate", tmp_path / "judge.yaml", "--json")[1])["prompts"] == 8
    scores = {
        "base": str(base),
        "adapters": {"lora": str(tmp_path / "lora")},
        "tasks": {"a": str(tmp_path / "a.jsonl")},
    }
    (tmp_path / "scores.yaml").write_text(yaml.safe_dump(scores))
    assert set(json.loads(run("evaluate", tmp_path / "scores.yaml", "--json", "-q")[1])["scores"]) == {"base", "lora"}
    code, out, _ = run("inspect", base, tmp_path / "lora")
    assert code == 0
    assert "all fit together" in out
    other = tiny.save_model(tiny.llama(hidden_size=32), tmp_path / "other")
    assert run("inspect", base, other, "--json")[0] == 1


def test_trust_is_given_on_the_command_line_alone(run, tmp_path, monkeypatch):
    asked = []

    def load(router: object, *, trust_remote_code: bool) -> None:
        asked.append(trust_remote_code)
        raise MissingError("enough seen")

    monkeypatch.setattr("toolkit.jobs.route.load_router", load)
    (tmp_path / "judge.yaml").write_text(yaml.safe_dump({"router": "r", "data": {"a": "a.jsonl"}}))
    for flags in ([], ["--trust-remote-code"]):
        assert run("route", "explain", "r", "hello", *flags)[0] == 1
        assert run("route", "evaluate", tmp_path / "judge.yaml", *flags)[0] == 1
    assert asked == [False, False, True, True]


def test_what_to_do_after_the_quickstart_can_be_pasted(run, tmp_path, monkeypatch):
    monkeypatch.setattr("toolkit.jobs.quickstart.quickstart", lambda out, **options: Report())
    _, out, _ = run("quickstart", tmp_path / "two words", "--quiet")
    commands = [shlex.split(line) for line in out.splitlines() if line.startswith("  toolkit")]
    assert [c[2] for c in commands if c[1] in ("serve", "run")] == [
        f"{tmp_path}/two words/serve.yaml",
        f"{tmp_path}/two words/recipe.yaml",
    ]


def test_recipe_and_skills(run, tmp_path):
    (tmp_path / "recipe.yaml").write_text(
        yaml.safe_dump({"steps": {"data": {"skills": {"skills": ["sort"], "train": 2, "test": 1}}}})
    )
    code, out, _ = run("run", tmp_path / "recipe.yaml", tmp_path / "run", "--json")
    assert code == 0
    assert json.loads(out)["steps"]["data"]["skills"] == ["sort"]
    code, out, _ = run("skills", tmp_path / "skills", "--train", 2, "--test", 1)
    assert code == 0
    assert "pig_latin" in out
