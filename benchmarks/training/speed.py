"""Tokens per CPU-second against transformers' Trainer and PEFT on the same rows, and packing against padding."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.training.work import in_process, word_tokenizer, write_even_rows, write_model
from toolkit.data.batches import padding_share
from toolkit.data.rows import read_rows, write_rows
from toolkit.errors import MissingError
from toolkit.tables import Table

AIM_SPEED, AIM_PACKING = 0.97, 0.85
PACKED = 384
"""Tokens of a packed row: more than the longest of these documents has, and no more, for a row attends to itself."""


def speed(work: Path, *, repeat: int, steps: int, size: str = "3M", tokens: int = 128) -> tuple[Table, dict[str, Any]]:
    """Train the same rows with both sides in turn, from files to a saved adapter; return medians and all runs.

    All rows have the same length, so that no side gains by its batches.
    """
    base = write_model(work / size, size)
    data = write_even_rows(work / "even.jsonl", 64, tokens)
    options = {"base": base, "data": data, "batch_size": 8, "steps": steps}
    runs: dict[str, list[dict[str, Any]]] = {"plain": [], "ours": []}
    for _ in range(repeat):
        for side, found in runs.items():
            found.append(in_process(side, options | {"out": work / side}))
    speeds = {side: median(run["tokens"] / run["cpu"] for run in found) for side, found in runs.items()}
    ratio = speeds["ours"] / speeds["plain"]
    rows = [[speeds["plain"], speeds["ours"], f"{ratio:.3f}", f"{AIM_SPEED}"]]
    columns = ("Trainer + PEFT, tokens per CPU-second", "toolkit", "ratio", "aim")
    return Table(columns, rows, digits=0), {"speed": runs, "ratio": ratio}


def packing(work: Path, data: Path, *, repeat: int, rows: int, size: str = "3M") -> tuple[Table, dict[str, Any]]:
    """Train one epoch of maths problems in random batches, by length, and packed; return useful tokens by CPU-second.

    Args:
        work: folder of what is written.
        data: folder with `gsm8k_train.jsonl`, rows of `prompt` and `completion`.
        repeat: epochs of every kind, in turn.
        rows: of an epoch, drawn from all.
        size: of the model.

    Raises:
        MissingError: no such file.
    """
    source = data / "gsm8k_train.jsonl"
    if not source.is_file():
        raise MissingError(f"{source}: no such file; --data names a folder of the layout of domains")
    tokenizer = word_tokenizer([source])
    base, file = write_model(work / f"words-{size}", size, tokenizer), work / f"maths{rows}.jsonl"
    everything = [dict(row.data) for row in read_rows(source)]
    write_rows(file, random.Random(0).sample(everything, rows))
    lengths = [_length(tokenizer, row) for row in read_rows(file)]
    shown, found = [], []
    for batch in (8, 16, 32):
        line, runs = _packing_at(work, base, file, lengths, batch, repeat)
        shown.append(line)
        found.append(runs | {"batch": batch})
    columns = ("batch", "padded", "by length", "packed", "gain of packing", "lengths allow", "share of it", "aim")
    return Table(columns, shown, digits=0), {"packing": found, "rows": rows, "tokens": sum(lengths)}


def _length(tokenizer: Any, row: Any) -> int:
    return len(tokenizer(row.data["prompt"])["input_ids"]) + len(tokenizer(row.data["completion"])["input_ids"]) + 1


def _packing_at(
    work: Path, base: Path, file: Path, lengths: Sequence[int], batch: int, repeat: int
) -> tuple[list[Any], dict[str, Any]]:
    """Measure at one size of batches; packed ones hold as many tokens as padded ones on average."""
    allowed = gain_allowed(lengths, batch)
    wide = max(1, round(batch * allowed * sum(lengths) / len(lengths) / PACKED))
    kinds = {
        "padded": (batch, {"batches": "random"}),
        "by length": (batch, {"batches": "by_length"}),
        "packed": (wide, {"packing": True, "max_length": PACKED, "batches": "random"}),
    }
    runs: dict[str, list[dict[str, Any]]] = {kind: [] for kind in kinds}
    for _ in range(repeat):
        for kind, (rows, batching) in kinds.items():
            options = {"base": base, "data": file, "batch_size": rows, "batching": batching, "out": work / "packing"}
            runs[kind].append(in_process("ours", options))
    speeds = {kind: median(run["tokens"] / run["cpu"] for run in found) for kind, found in runs.items()}
    gain = speeds["packed"] / speeds["padded"]
    line = [batch, *speeds.values(), f"{gain:.2f}", f"{allowed:.2f}", f"{gain / allowed:.0%}", f"{AIM_PACKING:.0%}"]
    return line, {"runs": runs, "gain": gain, "allowed": allowed}


def gain_allowed(lengths: Sequence[int], batch: int, draws: int = 200) -> float:
    """Return tokens with padding over those without it, in random batches."""
    rng, order = random.Random(0), list(range(len(lengths)))
    shares = []
    for _ in range(draws):
        rng.shuffle(order)
        batches = [order[start : start + batch] for start in range(0, len(order), batch)]
        shares.append(padding_share(lengths, batches))
    return 1 / (1 - sum(shares) / draws)
