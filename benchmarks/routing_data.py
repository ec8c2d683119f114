"""Make rows of measured answers from RouteLLM's tables: python -m benchmarks.routing_data CHECKOUT OUT.

`CHECKOUT` is a clone of github.com/lm-sys/RouteLLM (Apache-2.0), which has a CSV file per subject of MMLU and one of
GSM8K, with whether Mixtral-8x7B and GPT-4 answered each question right.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from toolkit.checkpoints.writer import staged
from toolkit.data.rows import Row, read_rows, write_rows
from toolkit.errors import DataError, MissingError

MODELS = {"weak_correct": "mixtral", "strong_correct": "gpt-4"}
"""What the names of the columns have in them."""


def converted(path: Path, subject: str) -> Iterator[dict[str, Any]]:
    """Yield the rows of one table.

    Raises:
        DataError: a row without the prompt, or without exactly one column of rights and wrongs of each model.
    """
    for row in read_rows(path):
        yield {"prompt": row.data["prompt"], "subject": subject} | {
            name: _right(row, part) for name, part in MODELS.items()
        }


def _right(row: Row, part: str) -> bool:
    said = [value for name, value in row.data.items() if part in name.lower() and value in ("True", "False")]
    if len(said) != 1:
        raise DataError(f"{row.place}: expected one column of {part} with True or False, got {len(said)}")
    return said[0] == "True"


def main(given: Sequence[str] | None = None) -> None:
    """Read every table, write one file for MMLU and one for GSM8K."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.routing_data", description=__doc__)
    parser.add_argument("checkout", type=Path)
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args(given)
    folder = arguments.checkout / "routellm" / "evals"
    subjects = {path.stem.removeprefix("mmlu_"): path for path in sorted(folder.glob("mmlu/responses/mmlu_*.csv"))}
    if not subjects:
        raise MissingError(f"{folder}: no tables of MMLU; name a clone of lm-sys/RouteLLM")
    tables = {"mmlu": subjects, "gsm8k": {"gsm8k": folder / "gsm8k" / "gsm8k_responses.csv"}}
    with staged(arguments.out) as partial:
        for name, files in tables.items():
            rows = [row for subject, path in files.items() for row in converted(path, subject)]
            write_rows(partial / f"{name}_weak_strong.jsonl", rows)
            print(f"{name}: {len(rows)} rows")


if __name__ == "__main__":
    main()
