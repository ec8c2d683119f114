"""Memory of ways to train at growing lengths, each in a process of its own: what is held, by part, and what the system
saw."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

from benchmarks.training.work import LORA, in_process, write_even_rows, write_model
from toolkit.tables import Cell, Table

WAYS: dict[str, dict[str, Any]] = {
    "full": {"adapter": {"method": "full"}},
    "LoRA": {"adapter": {"method": "lora", **LORA}},
    "LoRA, NF4 base": {"adapter": {"method": "lora", **LORA}, "nf4": True},
    "GaLore": {"adapter": {"method": "full"}, "methods": {"method": "galore", "rank": 32}},
    "full, StreamBP": {
        "adapter": {"method": "full"},
        "methods": {"method": "streambp", "chunk": 256, "logits_chunk": 128},
    },
    "LoRA, StreamBP": {
        "adapter": {"method": "lora", **LORA},
        "methods": {"method": "streambp", "chunk": 256, "logits_chunk": 128},
    },
}
PARTS = ("weights", "gradients", "optimizer", "saved")


def memory(work: Path, lengths: Sequence[int], *, size: str = "8M") -> tuple[list[Table], dict[str, Any]]:
    """Measure every way at every length; return a table for each of two measures, and all numbers."""
    base = write_model(work / size, size)
    found: dict[str, dict[int, dict[str, int]]] = {way: {} for way in WAYS}
    for tokens in lengths:
        data = write_even_rows(work / f"{tokens}.jsonl", 2, tokens)
        for way in WAYS:
            found[way][tokens] = in_process("memory", {"way": way, "base": base, "data": data})
    parts: list[list[Cell]] = []
    for way, of_way in found.items():
        first = of_way[lengths[0]]
        fixed = [first[part] / 2**20 for part in PARTS[:3]]
        parts.append([way, *fixed, *(of_way[tokens]["saved"] / 2**20 for tokens in lengths)])
    columns = ("MiB", "weights", "gradients", "optimizer", *(f"saved, {tokens:,}" for tokens in lengths))
    resident = [[way, *(of_way[tokens]["resident"] / 2**20 for tokens in lengths)] for way, of_way in found.items()]
    heads = ("MiB", *(f"{tokens:,} tokens" for tokens in lengths))
    tables = [
        Table(columns, parts, "what is held"),
        Table(heads, resident, "most that was resident, over what was before the model", digits=0),
    ]
    return tables, {"memory": found, "size": size}


def measure(options: dict[str, Any]) -> dict[str, int]:
    """Train two steps of one row; return the bytes of all parts, and how the resident memory grew."""
    import toolkit.adapters.trainer  # noqa: F401  # before the memory is read
    from benchmarks.training.nf4 import in_four_bits
    from toolkit.adapters.callbacks import peak_memory
    from toolkit.adapters.train import train
    from toolkit.models.load import load_model, load_tokenizer

    way, before = WAYS[options["way"]], peak_memory()
    base: Any = options["base"]
    if way.get("nf4"):
        base = in_four_bits(load_model(base).model), load_tokenizer(base)
    training = {"max_steps": 2, "batch_size": 1, "report_to": [], "methods": way.get("methods", ())}
    spec = {"base": base, "adapter": way["adapter"], "data": {"train": options["data"]}, "device": "cpu"}
    with _parts_noted() as found, TemporaryDirectory() as folder:
        train(spec | {"training": training}, Path(folder) / "out", quiet=True)
    return {**found, "resident": peak_memory() - before}


@contextmanager
def _parts_noted() -> Iterator[dict[str, int]]:
    """Note, inside the block, the bytes of weights, gradients, optimizer state, and of what a loss keeps."""
    from torch.autograd.graph import saved_tensors_hooks

    from toolkit.adapters.loop import AdapterTrainer

    found: dict[str, int] = {}
    compute_loss, training_step = AdapterTrainer.compute_loss, AdapterTrainer.training_step

    def loss(self: Any, model: Any, *args: Any, **options: Any) -> Any:
        own, kept = _storages([*model.parameters(), *model.buffers()]), []

        def keep(value: Any) -> Any:
            kept.append(value.untyped_storage())
            return value

        with saved_tensors_hooks(keep, lambda value: value):
            result = compute_loss(self, model, *args, **options)
        found["saved"] = sum({s.data_ptr(): s.nbytes() for s in kept if s.data_ptr() not in own}.values())
        found["weights"] = sum(own.values())
        return result

    def step(self: Any, model: Any, *args: Any, **options: Any) -> Any:
        result = training_step(self, model, *args, **options)
        state = self.optimizer.optimizer.state.values()
        found["gradients"] = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
        found["optimizer"] = sum(v.nbytes for of_one in state for v in of_one.values() if hasattr(v, "nbytes"))
        return result

    with patch.object(AdapterTrainer, "compute_loss", loss), patch.object(AdapterTrainer, "training_step", step):
        yield found


def _storages(tensors: Sequence[Any]) -> dict[int, int]:
    """Return the bytes of every memory that tensors lie in, by its address."""
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}


if __name__ == "__main__":
    print(json.dumps(measure(json.loads(sys.argv[1]))))
