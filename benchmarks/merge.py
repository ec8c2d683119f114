"""Merging against mergekit: `python -m benchmarks.merge [--mergekit PATH] [--methods NAME,...] [--repeat 5]`.

Both tools run the same YAML on the same files, in turn, each in a process of its own; CPU seconds hold the imports.
With `--device cuda` merging on a GPU is measured against the disk instead; see `benchmarks.device`.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from benchmarks.measure import Cost, in_turn, machine, middle, run, save

HERE = Path(__file__).parent
DELTAS = {"weight": 0.4, "density": 0.5}
METHODS: dict[str, dict[str, Any]] = {
    "passthrough": {"models": 1},
    "linear": {"model": {"weight": 0.4}},
    "slerp": {"models": 2, "base": 1, "parameters": {"t": [0.0, 0.5, 0.3, 0.7, 1.0]}},
    "task_arithmetic": {"base": 0, "model": {"weight": 0.4}},
    "ties": {"base": 0, "model": DELTAS, "parameters": {"normalize": True}},
    "dare_linear": {"base": 0, "model": DELTAS},
    "dare_ties": {"base": 0, "model": DELTAS},
    "breadcrumbs": {"base": 0, "model": {**DELTAS, "gamma": 0.01}},
    "sce": {"base": 0, "parameters": {"select_topk": 0.1}},
    "della": {"base": 0, "model": {**DELTAS, "epsilon": 0.15}},
    "model_stock": {"base": 0},
    "karcher": {},
    "arcee_fusion": {"models": 1, "base": 0},
}
"""What each method is run with: how many of the fine-tunes, which model is the base (0 is theirs), parameters."""
GOALS = {
    **dict.fromkeys(("linear", "slerp", "task_arithmetic"), 1 / 5),
    **dict.fromkeys(("ties", "breadcrumbs", "sce"), 1 / 8),
    "della": 1 / 7,
    **dict.fromkeys(("dare_linear", "dare_ties"), 1 / 4),
}
"""The share of mergekit's CPU seconds that is aimed at."""


def spec(method: str, models: Path) -> dict[str, Any]:
    """Return the YAML that both tools run."""
    options = METHODS[method]
    names = [str(models / f"tuned{i + 1}") for i in range(options.get("models", 3))]
    inputs = [{"model": name} | ({"parameters": options["model"]} if "model" in options else {}) for name in names]
    found: dict[str, Any] = {"merge_method": method, "models": inputs, "dtype": "bfloat16"}
    if "base" in options:
        found["base_model"] = str(models / ("base" if options["base"] == 0 else f"tuned{options['base']}"))
    if "parameters" in options:
        found["parameters"] = options["parameters"]
    return found


def compare(method: str, models: Path, work: Path, mergekit: str | None, repeat: int) -> dict[str, list[Cost]]:
    """Merge with both tools in turn."""
    path = work / f"{method}.yaml"
    path.write_text(yaml.safe_dump(spec(method, models), sort_keys=False))
    out = work / "merged"
    tool = Path(sys.executable).with_name("toolkit")
    commands: dict[str, list[str | Path]] = {"toolkit": [tool, "merge", path, out, "--quiet"]}
    if mergekit:
        commands["mergekit"] = [mergekit, path, out, "--allow-crimes"]

    def once(command: Sequence[str | Path]) -> Cost:
        shutil.rmtree(out, ignore_errors=True)
        return run(command)

    return in_turn({name: partial(once, command) for name, command in commands.items()}, repeat)


def row(method: str, found: Mapping[str, Sequence[Cost]]) -> str:
    """Return a line of the table: medians, and ours as a share of theirs."""
    ours = middle(found["toolkit"])
    text = f"| {method} | {ours.cpu:.2f} | {ours.wall:.2f} | {ours.resident / 2**20:.0f} |"
    if "mergekit" not in found:
        return text + " | | | |"
    theirs = middle(found["mergekit"])
    goal = f"1/{round(1 / GOALS[method])}" if method in GOALS else ""
    text += f" {theirs.cpu:.2f} | {theirs.wall:.2f} | {theirs.resident / 2**20:.0f} |"
    return text + f" 1/{theirs.cpu / ours.cpu:.1f} | {goal} |"


def main() -> None:
    """Write the models if they are not there, run, print, save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("runs/benchmarks/merge"))
    parser.add_argument("--size", default="0.23B")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--mergekit", default=shutil.which("mergekit-yaml", path=str(Path(sys.executable).parent)))
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--device", default=None, help="measure merging on this device against the disk")
    parser.add_argument("--warm", action="store_true", help="with --device: leave the inputs in the page cache")
    arguments = parser.parse_args()
    models = arguments.work / arguments.size
    subprocess.run([sys.executable, "-m", "benchmarks.models", models, "--size", arguments.size], check=True)
    if arguments.device:
        from benchmarks.device import report  # which takes the specs from here

        out = arguments.out or HERE / "results" / "merge_device.json"
        methods = arguments.methods.split(",")
        options = {"repeat": arguments.repeat, "warm": arguments.warm, "out": out}
        report(methods, models, arguments.work, arguments.device, **options)
        return
    results: dict[str, list[Cost]] = {}
    print("| method | CPU s | wall s | MiB | mergekit CPU s | wall s | MiB | share of CPU | aim |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for method in arguments.methods.split(","):
        found = compare(method, models, arguments.work, arguments.mergekit, arguments.repeat)
        print(row(method, found), flush=True)
        results |= {f"{method}/{tool}": costs for tool, costs in found.items()}
    versions = {name: version(name) for name in ("composition-toolkit", "numpy")}
    if arguments.mergekit:
        versions |= {name: version(name) for name in ("mergekit", "torch")}
    save(arguments.out or HERE / "results" / "merge.json", "merge", versions, results)
    print(f"\n{machine()}\n{versions}")


if __name__ == "__main__":
    main()
