"""Measure every kernel on a GPU: `python -m benchmarks.gpu [--ops NAME,...] [--shapes 7B,70B] [--minutes 8]`.

First what the device can do, then each operation at decode and prefill sizes: its time, its floor, eager torch and
torch's own attention. An operation is compared with float64 before, and what is wrong is not timed. Prints tables and
writes `benchmarks/results/gpu.json`. Without a GPU it says so and exits with 2.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from itertools import groupby
from pathlib import Path

import torch

from benchmarks.gpu import attention, decode, lora, weights
from benchmarks.gpu.case import Case, Ceilings
from benchmarks.gpu.clock import GpuClock, ceilings
from benchmarks.gpu.report import Bench, Row, step_text, table
from benchmarks.gpu.shapes import SHAPES, Shape

RESULTS = Path(__file__).parent.parent / "results" / "gpu.json"
STEP = {"batch": 64, "context": 512, "goal": 2.0e-3}
"""The decode step that is aimed at on an H200."""


def list_cases(shapes: Sequence[Shape]) -> list[Case]:
    """Return everything that is measured, the decode step of the first model first."""
    found = lora.step_cases(shapes[0], batch=int(STEP["batch"]))
    for shape in shapes:
        found += [*lora.cases(shape), *attention.cases(shape), *decode.cases(shape), *weights.cases(shape)]
    # Sorting keeps the order within an operation.
    return sorted([*found, *weights.merge_cases()], key=lambda case: case.op.name)


def environment(device: torch.device) -> dict[str, object]:
    """Return what the numbers depend on besides the code."""
    import triton

    properties = torch.cuda.get_device_properties(device)
    return {
        "gpu": properties.name,
        "multiprocessors": properties.multi_processor_count,
        "bytes": properties.total_memory,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
    }


def save(path: Path, about: dict[str, object], limits: Ceilings, rows: Sequence[Row]) -> None:
    """Write everything, seconds as they are."""
    data = {**about, "ceilings": asdict(limits), "rows": [asdict(row) | {"share": row.share} for row in rows]}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data, indent=1) + "\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, save; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ops", default="", help="names that an operation must begin with, by comma")
    parser.add_argument("--shapes", default="7B,70B", help="of models, by comma")
    parser.add_argument("--minutes", type=float, default=8.0, help="after which nothing more is begun")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print(f"benchmarks.gpu measures on a GPU, and torch {torch.__version__} finds none here", file=sys.stderr)
        return 2
    started, device = time.monotonic(), torch.device("cuda", torch.cuda.current_device())
    shapes, ops = [SHAPES[name] for name in options.shapes.split(",")], tuple(options.ops.split(","))
    about, clock = environment(device), GpuClock(device)
    limits = ceilings(clock, device)
    print(f"{about}\n\ncopy {limits.bandwidth / 1e12:.2f} TB/s, bfloat16 product {limits.rate / 1e12:.0f} TFLOP/s")
    # The last case that is begun takes a while too.
    bench = Bench(device, torch.bfloat16, clock, limits, until=started + 60 * options.minutes - 30)
    rows: list[Row] = []
    chosen = [case for case in list_cases(shapes) if case.op.name.startswith(ops)]
    for _, own in groupby(chosen, key=lambda case: case.op.name):
        new = []
        for case in own:
            new.append(bench.run(case))
            torch.cuda.empty_cache()
        rows += new
        print(f"\n{table(new)}", flush=True)
    steps = [row for row in rows if " step, " in row.case]
    print(f"\n{step_text(shapes[0], steps, limits, **STEP)}")  # type: ignore[arg-type]
    save(options.out, about, limits, rows)
    print(f"{time.monotonic() - started:.0f} s; wrote {options.out}")
    return 1 if any(row.ours is None for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
