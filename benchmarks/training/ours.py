"""The toolkit's training in a process of its own."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import toolkit.adapters.trainer  # noqa: F401  # imports are not measured, on neither side
from benchmarks.training.work import LORA
from toolkit.adapters.train import train


def run(options: dict[str, Any]) -> dict[str, Any]:
    """Train a LoRA from files to a folder; return CPU seconds, tokens, the mean loss and the share of padding."""
    training = {"batch_size": options["batch_size"], "learning_rate": 1e-3, "weight_decay": 0.0, "report_to": []}
    training |= {"max_steps": options["steps"]} if "steps" in options else {"num_epochs": 1}
    spec = {
        "base": options["base"],
        "adapter": {"method": "lora", **LORA},
        "data": {"train": options["data"], **options.get("batching", {"batches": "random"})},
        "training": training,
        "device": "cpu",
    }
    started = time.process_time()
    result = train(spec, Path(options["out"]), overwrite=True, quiet=True)
    cpu = time.process_time() - started
    data = result.numbers["data"]
    tokens = data["tokens"] * (options["steps"] * options["batch_size"] / data["rows"] if "steps" in options else 1)
    return {"cpu": cpu, "tokens": tokens, "loss": result.numbers["train_loss"], "padding": data["padding"]}


if __name__ == "__main__":
    print(json.dumps(run(json.loads(sys.argv[1]))))
