"""What a finished run leaves beside its weights: a record for programs, a model card for people."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

from toolkit.adapters.catalogue import FULL
from toolkit.adapters.spec import TrainSpec
from toolkit.checkpoints.adapters import open_adapter
from toolkit.checkpoints.companions import file_hashes, versions, write_card
from toolkit.checkpoints.writer import write_text
from toolkit.errors import CheckpointError, UnsupportedError
from toolkit.tables import Table, human_count

LIBRARIES = ("torch", "transformers", "peft", "accelerate")


def write_records(
    spec: TrainSpec, folder: Path, name: str, numbers: Mapping[str, Any], data: Mapping[str, str]
) -> None:
    """Write `training.json` and the model card.

    Args:
        spec: of the run.
        folder: that holds its weights.
        name: of the adapter or model.
        numbers: what the run reports.
        data: SHA-256 of each data file, by its path in the spec.
    """
    described = spec.model_dump(mode="json")
    hashes = {**data, **file_hashes(sorted(folder.glob("*.safetensors")))}
    record = {"spec": described, "versions": versions(*LIBRARIES), "sha256": hashes, **numbers}
    write_text(folder / "training.json", json.dumps(record, indent=2) + "\n")
    full = spec.adapter.method == FULL
    what = f"{spec.adapter.method} {json.dumps(spec.adapter.fields)}"
    if full:
        what = "every weight" if spec.adapter.layers is None else f"layers {list(spec.adapter.layers)}"
    sources = ", ".join(f"`{source.path}`" for source in spec.data.sources())
    write_card(
        folder,
        name,
        f"Trained {what} on {sources} for {numbers['steps']} steps;"
        f" mean training loss {as_text(numbers['train_loss'])}.",
        tags=[spec.adapter.method],
        base=[str(described["base"])],
        spec=spec.model_dump(mode="json", exclude_defaults=True),
        details=Table(("file", "sha256"), list(map(list, hashes.items()))).to_markdown(),
        library="transformers" if full else "peft",
        libraries=LIBRARIES,
    )


def limits(folder: Path) -> str | None:
    """Say what the rest of the toolkit cannot do with an adapter that PEFT has just saved; `None` if it can do all."""
    try:
        adapter = open_adapter(folder)
    except (CheckpointError, UnsupportedError) as error:
        return f"PEFT alone reads this adapter: {str(error).removeprefix(f'{folder}: ')}"
    with closing(adapter):
        embeddings = [module for module, part in adapter.parts.items() if part.embedding]
        if embeddings:
            return f"can be merged but not served: it adapts {embeddings[0]}, which is no linear layer"
        if adapter.whole:
            return f"can be merged but not served: it stores {min(adapter.whole)} whole"
    return None


def as_text(value: object) -> str:
    """Write a number of a report for people."""
    if isinstance(value, float):
        return f"{value:.4g}"
    if value is None:
        return "-"
    return human_count(value) if isinstance(value, int) and value >= 10000 else str(value)
