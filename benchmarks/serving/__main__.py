"""Serving many adapters of one base: `python -m benchmarks.serving [--size 17M] [--repeat 3] [--vllm PATH]`.

One thread, float32, requests of 32 prompt and 32 new tokens that arrive at once, rank-16 adapters on all linears: the
same weights, adapters and prompts for all engines, each in a process of its own, measured in turn in CPU seconds of
that process. Our prefix cache is off, so every prompt is computed.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.measure import machine
from benchmarks.serving.drive import RUNS, Results, measure, workers
from benchmarks.serving.work import CASES, POSITIONS, REGISTERED, SIZES, write_all
from toolkit.embedded.tokenizer import build_tokenizer

Side = tuple[str, str]
"""A case and the engine that answered it."""

OURS = "toolkit"
AIMS: list[tuple[Side, Side, dict[str, float]]] = [
    (("base", OURS), ("base", "continuous"), {"17M": 1.5, "111M": 1.5}),
    (("base", OURS), ("base", "transformers"), {"17M": 1.0, "111M": 1.0}),
    (("one adapter", OURS), ("base", OURS), {}),
    (("16 adapters", OURS), ("base", OURS), {"17M": 0.80, "111M": 0.88}),
    (("16 adapters", OURS), ("16 adapters", "PEFT"), {"17M": 1.8}),
    (("16 adapters", OURS), ("16 adapters", "vLLM"), {"17M": 1.8}),
    (("64 adapters", OURS), ("base, 64", OURS), {"17M": 0.75}),
    (("prefill, 16 adapters", OURS), ("prefill, base", OURS), {"17M": 0.88}),
    (("200 of 1,000", OURS), ("8 of 1,000", OURS), {"17M": 0.85}),
]
"""Speeds that are compared, and the ratio that is aimed at by size of the model."""

MOST_SCHEDULER = 0.05
"""The part of a step that the scheduler may take."""


def ratios(results: Results, size: str) -> Iterator[dict[str, Any]]:
    """Yield the comparisons whose two sides were measured."""
    for one, other, aims in AIMS:
        ours, theirs = results.speed(*one), results.speed(*other)
        if ours and theirs:
            yield {"ours": one, "of": other, "ratio": ours / theirs, "aim": aims.get(size)}


def table(results: Results, engines: Sequence[str], cases: Sequence[str]) -> Iterator[str]:
    """Yield the lines of a table: tokens per CPU-second, and how many of our rows are another engine's own."""
    yield "| tokens per CPU-second | " + " | ".join(engines) + " | rows equal |"
    yield "| --- |" + " --- |" * (len(engines) + 1)
    for case in cases:
        speeds = [results.speed(case, engine) for engine in engines]
        compared = [(engine, results.equal_rows(case, engine)) for engine in engines if engine != OURS]
        rows = ", ".join(f"{engine} {found[0]}/{found[1]}" for engine, found in compared if found)
        yield f"| {case} | " + " | ".join(f"{s:,.0f}" if s else "" for s in speeds) + f" | {rows} |"


def ratio_table(results: Results, size: str) -> Iterator[str]:
    """Yield the lines of the table of comparisons."""
    yield "| our speed | as a share of | ratio | aim |"
    yield "| --- | --- | --- | --- |"
    for found in ratios(results, size):
        case, engine = found["of"]
        other = f"our own {case}" if engine == OURS else f"{engine}, {case}"
        yield f"| {found['ours'][0]} | {other} | {found['ratio']:.2f} | {found['aim'] or ''} |"
    if results.shares:
        parts = ", ".join(f"{part} {share:.1%}" for part, share in results.shares.items())
        yield f"\nour step: {parts} (aim: scheduler at most {MOST_SCHEDULER:.0%})"


def as_json(results: Results, size: str) -> dict[str, Any]:
    """Return all runs, with the machine and the versions."""
    rows = {(case, engine): results.equal_rows(case, engine) for case, engine in results.costs if engine != OURS}
    return {
        "benchmark": "serving",
        "machine": machine(),
        "versions": results.versions,
        "size": {"name": size, **asdict(SIZES[size])},
        "runs": {f"{case}/{engine}": [asdict(c) for c in costs] for (case, engine), costs in results.costs.items()},
        "tokens": {case: CASES[case].tokens for case, _ in results.costs},
        "rows_equal": {f"{case}/{engine}": found for (case, engine), found in rows.items()},
        "ratios": list(ratios(results, size)),
        "shares_of_our_step": results.shares,
    }


def why_no_vllm(python: str | None) -> str | None:
    """Return why vLLM is not measured; `None` if it can be."""
    if not python:
        return "no --vllm PYTHON, the Python of an environment with its CPU build"
    done = subprocess.run([python, "-c", "import vllm"], capture_output=True, text=True)
    return f"{python} cannot import it: {done.stderr.strip().splitlines()[-1:]}" if done.returncode else None


def parse() -> argparse.Namespace:
    """Read the arguments."""
    parser = argparse.ArgumentParser(prog="benchmarks.serving", description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("runs/benchmarks/serving"))
    parser.add_argument("--size", choices=SIZES, default="17M")
    parser.add_argument("--cases", default=";".join(CASES), help="separated by semicolons")
    parser.add_argument("--peers", default="transformers,continuous,PEFT")
    parser.add_argument("--vllm", default=None, help="Python of an environment with vLLM's CPU build")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--json", type=Path, default=None, help="write all runs there")
    return parser.parse_args()


def main() -> None:
    """Write the models if they are not there, run, print, save."""
    asked = parse()
    cases = [case.strip() for case in asked.cases.split(";")]
    unknown = [case for case in cases if case not in CASES]
    peers = [peer for peer in asked.peers.split(",") if peer]
    unknown += [peer for peer in peers if peer not in RUNS]
    if unknown:
        raise SystemExit(f"unknown: {', '.join(unknown)} (cases: {'; '.join(CASES)}; peers: {', '.join(RUNS)})")
    large = any(CASES[case].engine == "large" for case in cases)
    most = max((CASES[case].adapters for case in cases), default=0)
    folder = write_all(asked.work / asked.size, SIZES[asked.size], most, REGISTERED if large else max(most, 1))
    build_tokenizer(POSITIONS).save_pretrained(folder / "base")
    pythons = {OURS: sys.executable} | dict.fromkeys(peers, sys.executable)
    reason = why_no_vllm(asked.vllm)
    if reason:
        print(f"vLLM is skipped: {reason}\n")
    else:
        pythons["vLLM"] = asked.vllm
    with workers(pythons, folder, asked.size) as found:
        results = measure(found, cases, asked.repeat)
    print("\n".join([*table(results, list(pythons), cases), "", *ratio_table(results, asked.size)]))
    print(f"\n{machine()}\n{results.versions}")
    if asked.json:
        asked.json.parent.mkdir(parents=True, exist_ok=True)
        asked.json.write_text(json.dumps(as_json(results, asked.size), indent=1) + "\n")


if __name__ == "__main__":
    main()
