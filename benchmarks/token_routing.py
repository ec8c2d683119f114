"""Arrow in the engine against PEFT's: `python -m benchmarks.token_routing [--size 17M] [--experts 16] [--json FILE]`.

One forward pass over the same tokens with the same experts, in turn, one thread: a prompt, and one token of each of
many answers. PEFT computes the outputs of all experts, ours one product of all ranks. Beside them the base alone, so
that what routing costs is seen.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import torch
from peft import ArrowConfig, create_arrow_model
from transformers import AutoModelForCausalLM

from benchmarks.measure import machine
from benchmarks.serving.work import SIZES, Size, write_adapter, write_base
from toolkit.embedded.tokenizer import build_tokenizer
from toolkit.models.load import quiet_transformers
from toolkit.serving.engine import Engine
from toolkit.tables import Table

TOP_K, RANK = 2, 8
SHAPES = {"a prompt of 256 tokens": (1, 256), "a token of 16 answers": (16, 1)}

Pass = Callable[[torch.Tensor], Any]


def main() -> None:
    """Measure and print; write all runs where a file is named."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=SIZES, default="17M")
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--repeat", type=int, default=7)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        size = SIZES[given.size]
        paths = write(Path(folder), size, given.experts)
        passes = {"base": base_pass(Path(folder)), "PEFT": peft_pass(Path(folder), paths)}
        passes["ours"] = stack.enter_context(our_pass(Path(folder), paths))
        runs = {name: measured(passes, shape, size, given.repeat) for name, shape in SHAPES.items()}
    print(table(runs).to_text())
    if given.json:
        versions = {name: version(name) for name in ("torch", "transformers", "peft")}
        about = {"size": given.size, "experts": given.experts, "rank": RANK, "top_k": TOP_K}
        text = json.dumps({"machine": machine(), "versions": versions, **about, "seconds": runs}, indent=1)
        given.json.write_text(text + "\n")


def write(folder: Path, size: Size, count: int) -> list[Path]:
    """Write a base and experts; return the folders of the latter."""
    build_tokenizer(512).save_pretrained(write_base(folder / "base", size))
    return [write_adapter(folder / str(i), size, i, RANK) for i in range(count)]


def base_pass(folder: Path) -> Pass:
    """Return the base's forward pass."""
    model = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32).eval()
    return lambda ids: model(ids, use_cache=False).logits


def peft_pass(folder: Path, paths: list[Path]) -> Pass:
    """Return that of PEFT's Arrow."""
    config = ArrowConfig(top_k=TOP_K, router_temperature=1.0, rng_seed=0)
    with quiet_transformers(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        base = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
        model = create_arrow_model(base, [str(path) for path in paths], config).eval()
    return lambda ids: model(input_ids=ids, use_cache=False).logits


@contextmanager
def our_pass(folder: Path, paths: list[Path]) -> Iterator[Pass]:
    """Yield that of the engine's model with Arrow on every row."""
    names = [f"expert{i}" for i in range(len(paths))]
    adapters = dict(zip(names, paths, strict=True))
    routers = {"arrow": {"router": "arrow", "adapters": names, "top_k": TOP_K}}
    with (
        Engine(str(folder / "base"), adapters, token_routers=routers, device="cpu") as engine,
        engine.using("arrow") as model,
    ):
        yield lambda ids: model(ids, use_cache=False).logits


def measured(passes: dict[str, Pass], shape: tuple[int, int], size: Size, repeat: int) -> dict[str, list[float]]:
    """Return the seconds of every pass, in turn; the first round of each is not counted."""
    ids = torch.randint(size.vocabulary, shape, generator=torch.Generator().manual_seed(0))
    seconds: dict[str, list[float]] = {name: [] for name in passes}
    with torch.inference_mode():
        for _ in range(1 + repeat):
            for name, run in passes.items():
                started = time.process_time()
                run(ids)
                seconds[name].append(time.process_time() - started)
    return {name: found[1:] for name, found in seconds.items()}


def table(runs: dict[str, dict[str, list[float]]]) -> Table:
    """Return medians in milliseconds, and how many times as long PEFT's takes."""
    rows: list[list[Any]] = []
    for name, found in runs.items():
        base, theirs, ours = (median(found[engine]) for engine in ("base", "PEFT", "ours"))
        times = [f"{1000 * value:.1f}" for value in (base, theirs, ours)]
        rows.append([name, *times, f"{theirs / ours:.1f}", f"{(theirs - base) / max(ours - base, 1e-9):.1f}"])
    return Table(("forward pass of", "base, ms", "PEFT, ms", "ours, ms", "PEFT/ours", "without the base"), rows)


if __name__ == "__main__":
    main()
