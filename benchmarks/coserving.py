"""Measure what fine-tuning beside requests costs them, and what they leave of it: python -m benchmarks.coserving.

A server in a process of its own, of one thread, gets Poisson arrivals from another process, alone and while a LoRA is
trained in it; the training's speed is read from the server's metrics, and compared with that of `toolkit train`.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from benchmarks.measure import machine
from benchmarks.training.work import LORA, write_even_rows
from toolkit.checkpoints.companions import versions
from toolkit.checkpoints.writer import write_text
from toolkit.tables import Cell, Table

TOKENS = 256
"""Of a row that is trained."""

TRAINING: dict[str, Any] = {"batch_size": 4, "learning_rate": 1e-3, "logging_steps": 1000}
RESULT = Path(__file__).parent / "results" / "coserving.json"
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


@contextmanager
def server(base: str, folder: Path, step_seconds: float) -> Iterator[httpx.Client]:
    """Yield a client of a server that can train."""
    tuning = {"step_seconds": step_seconds, "adapter": {"method": "lora", **LORA}, "training": TRAINING}
    spec = {"model": base, "port": 0, "fine_tuning": {"folder": str(folder), **tuning}}
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "serve.yaml", json.dumps(spec))
    command = [sys.executable, "-m", "toolkit", "serve", str(folder / "serve.yaml")]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)
    assert process.stderr
    try:
        address = next(found[1] for line in process.stderr if (found := re.search(r"listening on (\S+)/v1", line)))
        with httpx.Client(base_url=address, timeout=60, trust_env=False) as client:
            yield client
    finally:
        process.send_signal(signal.SIGTERM)
        process.stderr.read()
        process.wait()


def begin_training(client: httpx.Client, rows: Path) -> None:
    """Begin a job that ends with the server, and wait until it is under way."""
    files = {"file": ("rows.jsonl", rows.read_bytes())}
    sent = client.post("/v1/files", files=files, data={"purpose": "fine-tune"}).raise_for_status().json()
    body = {"model": "base", "training_file": sent["id"], "hyperparameters": {"n_epochs": 1000}}
    client.post("/v1/fine_tuning/jobs", json=body).raise_for_status()
    while trained(client) < 4 * TOKENS:
        time.sleep(0.1)


def trained(client: httpx.Client) -> float:
    """Return the tokens that were trained so far."""
    found = re.search(r"^toolkit_trained_tokens_total (\S+)", client.get("/metrics").text, re.MULTILINE)
    assert found
    return float(found[1])


def load(client: httpx.Client, rate: float, requests: int) -> dict[str, Any]:
    """Send requests as they come; return what `toolkit bench-serve` tells, and the tokens trained per second."""
    command = [sys.executable, "-m", "toolkit", "bench-serve", str(client.base_url), "--model", "base", "--json"]
    command += ["--rate", str(rate), "--requests", str(requests), "--prompt-words", "16", "--max-tokens", "32", "-q"]
    started, before = time.perf_counter(), trained(client)
    told = subprocess.run(command, capture_output=True, text=True, check=True, env=ENVIRONMENT).stdout
    speed = (trained(client) - before) / (time.perf_counter() - started)
    return {"load": json.loads(told), "trained_per_second": speed}


def alone(client: httpx.Client, seconds: float) -> float:
    """Return the tokens trained per second without requests."""
    before, started = trained(client), time.perf_counter()
    time.sleep(seconds)
    return (trained(client) - before) / (time.perf_counter() - started)


def plain(base: str, rows: Path, folder: Path, steps: int) -> float:
    """Return the tokens per second of `toolkit train`, from the difference of a longer and a shorter run."""
    seconds = {}
    for count in (steps // 4, steps):
        spec = {"base": base, "adapter": {"method": "lora", **LORA}, "data": {"train": str(rows)}}
        training = TRAINING | {"max_steps": count, "report_to": []}
        write_text(folder / "train.yaml", json.dumps(spec | {"training": training}))
        command = [sys.executable, "-m", "toolkit", "train", str(folder / "train.yaml"), str(folder / "plain")]
        started = time.perf_counter()
        subprocess.run([*command, "--overwrite", "-q"], check=True, capture_output=True, env=ENVIRONMENT)
        seconds[count] = time.perf_counter() - started
    return (steps - steps // 4) * TRAINING["batch_size"] * TOKENS / (seconds[steps] - seconds[steps // 4])


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Run all cases."""
    base = options.base
    rows = write_even_rows(options.work / "coserving.jsonl", 400, TOKENS)
    found: dict[str, Any] = {"plain": plain(base, rows, options.work, options.steps), "cases": []}
    for step_seconds in options.step_seconds:
        folder = options.work / f"coserving-{step_seconds}-{time.time_ns()}"
        with server(base, folder, step_seconds) as client:
            load(client, options.rate, 5)
            case = {"step_seconds": step_seconds, "requests_alone": load(client, options.rate, options.requests)}
            begin_training(client, rows)
            case["training_alone"] = alone(client, options.seconds)
            case["together"] = load(client, options.rate, options.requests)
        found["cases"].append(case)
    return found


def milliseconds(of: dict[str, Any], name: str) -> list[Cell]:
    """Return the median and the 99th percentile of a latency."""
    (run,) = of["load"]["runs"]
    return [1000 * run[name][key] for key in ("p50", "p99")]


def table(found: dict[str, Any]) -> Table:
    """Return a row for requests alone, and one for each bound."""
    rows: list[list[Cell]] = []
    first = found["cases"][0]["requests_alone"]
    rows.append(["requests alone", *milliseconds(first, "ttft"), *milliseconds(first, "tpot"), None, None])
    for case in found["cases"]:
        speeds = [case["training_alone"] / found["plain"], case["together"]["trained_per_second"] / found["plain"]]
        latencies = [*milliseconds(case["together"], "ttft"), *milliseconds(case["together"], "tpot")]
        rows.append([f"step_seconds {case['step_seconds']:g}", *latencies, *speeds])
    names = ("ms", "ttft, median", "p99", "tpot, median", "p99 ", "training alone, of toolkit train", "beside requests")
    return Table(names, rows, f"toolkit train: {found['plain']:,.0f} tokens per second", digits=2)


def main(given: Sequence[str] | None = None) -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.coserving", description=__doc__)
    parser.add_argument("--base", default="toolkit:base", help="model (default: toolkit:base)")
    parser.add_argument("--rate", type=float, default=2.0, help="requests per second (default: 2)")
    parser.add_argument("--requests", type=int, default=60, help="of a case (default: 60)")
    parser.add_argument("--seconds", type=float, default=20, help="of training alone (default: 20)")
    parser.add_argument("--steps", type=int, default=80, help="of toolkit train (default: 80)")
    parser.add_argument("--step-seconds", type=float, nargs="+", default=[0.02, 0.05, 0.1, 0.2], help="bounds")
    parser.add_argument("--work", type=Path, default=Path("runs/benchmarks/coserving"), help="for models and rows")
    parser.add_argument("--out", type=Path, default=RESULT, help="JSON file of the results")
    options = parser.parse_args(given)
    options.work.mkdir(parents=True, exist_ok=True)
    found = measure(options)
    sys.stdout.write(table(found).to_markdown() + "\n")
    record = {"benchmark": "coserving", "machine": machine(), "versions": versions("torch", "transformers", "peft")}
    write_text(options.out, json.dumps(record | {"rate": options.rate, "base": options.base} | found, indent=1) + "\n")


if __name__ == "__main__":
    main()
