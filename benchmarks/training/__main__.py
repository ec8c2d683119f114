"""Measure what training costs: python -m benchmarks.training speed packing longest memory [--data FOLDER]."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.measure import machine
from benchmarks.training.memory import memory
from benchmarks.training.speed import packing, speed
from toolkit.checkpoints.companions import versions
from toolkit.checkpoints.writer import write_text
from toolkit.errors import ToolkitError
from toolkit.tables import Table

KINDS = ("speed", "packing", "longest", "memory")
RESULTS = Path(__file__).parent.parent / "results"


def arguments(given: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training", description=__doc__)
    parser.add_argument("kinds", nargs="+", choices=KINDS, metavar="KIND", help=f"any of {', '.join(KINDS)}")
    parser.add_argument("--data", type=Path, help="for packing: folder that holds gsm8k_train.jsonl")
    parser.add_argument("--work", type=Path, default=Path("runs/benchmarks/training"), help="for models and rows")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON results")
    parser.add_argument("--size", help="of the random Llama, instead of each measurement's own")
    parser.add_argument("--repeat", type=int, default=3, help="runs of each side, in turn (default: 3)")
    parser.add_argument("--steps", type=int, default=60, help="of a run of speed (default: 60)")
    parser.add_argument("--rows", type=int, default=256, help="of an epoch of packing (default: 256)")
    parser.add_argument("--cap", type=int, default=256, help="MiB of longest (default: 256)")
    parser.add_argument("--lengths", default="512,1024,2048,4096", help="tokens of the rows of memory")
    return parser.parse_args(given)


def measured(kind: str, options: argparse.Namespace) -> tuple[list[Table], dict[str, Any]]:
    """Return the tables and numbers of one kind of measurement."""
    size = {"size": options.size} if options.size else {}
    if kind == "speed":
        table, numbers = speed(options.work, repeat=options.repeat, steps=options.steps, **size)
    elif kind == "packing":
        data = options.data or Path("data/domains")
        table, numbers = packing(options.work, data, repeat=options.repeat, rows=options.rows, **size)
    elif kind == "longest":
        from benchmarks.training.longest import longest  # imports torch, which the memory of the others must not share

        table, numbers = longest(options.work, cap=options.cap << 20, **size)
    else:
        return memory(options.work, [int(length) for length in options.lengths.split(",")], **size)
    return [table], numbers


def main(given: Sequence[str] | None = None) -> int:
    """Measure, print and save; return the exit code."""
    options = arguments(given)
    try:
        for kind in options.kinds:
            tables, numbers = measured(kind, options)
            print("\n\n".join(f"{table.title}\n\n{table.to_markdown()}".strip() for table in tables), flush=True)
            found = {"benchmark": f"training {kind}", "machine": machine()}
            found["versions"] = versions("torch", "transformers", "peft", "accelerate")
            options.out.mkdir(parents=True, exist_ok=True)
            write_text(options.out / f"training_{kind}.json", json.dumps(found | numbers, indent=1, default=str) + "\n")
    except ToolkitError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
