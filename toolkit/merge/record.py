"""What a merge leaves beside its weights: the model card, and a record from which the merge can be checked."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from toolkit.checkpoints.companions import (
    OTHER_FILES,
    TOKENIZER_FILES,
    copy_companions,
    file_hashes,
    versions,
    write_card,
    write_config,
)
from toolkit.checkpoints.reader import Checkpoint, MemoryCheckpoint
from toolkit.checkpoints.tokenizers import write_tokenizer
from toolkit.checkpoints.writer import write_text
from toolkit.merge.nested import MergedCheckpoint
from toolkit.merge.plan import Plan
from toolkit.merge.spec import MergeSpec
from toolkit.tables import Cell, Table, human_bytes

RECORD = "merge.json"

Hashes = Literal["sample", "full"]
"""How input files are identified: by a hash of some of their blocks, or of all of their bytes."""

_BLOCK, _BLOCKS = 1 << 14, 64
"""Bytes of a block of a sampled hash, and blocks of a file."""

_HUB_HASH = re.compile(r"[0-9a-f]{64}")
"""Name of a weight file in the hub's cache: its SHA-256."""


@dataclass(frozen=True)
class Companions:
    """What is written beside the weights of a merge.

    Attributes:
        hashes: of the inputs' files.
        card: write a model card.
        tokenizer: copy the tokenizer's files.
    """

    hashes: Hashes = "sample"
    card: bool = True
    tokenizer: bool = True

    def write(self, plan: Plan, folder: Path, non_finite: Sequence[str], inputs: Mapping[str, Sequence[str]]) -> None:
        """Write config, tokenizer, record and card of a finished merge."""
        donor = plan.inputs.donor
        write_config(donor, folder, plan.dtype, plan.config)
        if donor.folder:
            copy_companions(donor.folder, folder, (*TOKENIZER_FILES, *OTHER_FILES) if self.tokenizer else OTHER_FILES)
        if self.tokenizer:
            tokenizer = plan.vocabulary.tokenizer if plan.vocabulary else None
            write_tokenizer(folder, tokenizer, plan.template.text if plan.template else None)
        found = {
            "donors": plan.donors,
            "added_tokens": list(plan.added_tokens),
            "tensors": len(plan.jobs),
            "non_finite": list(non_finite),
            "non_finite_inputs": dict(inputs),
        }
        files = self.write_record(plan, plan.spec, folder, **found)
        if self.card:
            _write_card(folder, plan, files)

    def write_record(self, plan: Plan, spec: MergeSpec, folder: Path, **found: Any) -> Table:
        """Write what a merge was made from, by which it can be verified; return the inputs' files for its card.

        Args:
            plan: of what was merged.
            spec: that makes it again.
            folder: of the output.
            found: what else is to be told of it.
        """
        files = [file_identity(file, self.hashes) for file in sorted(plan.inputs.files())]
        record = {
            "spec": spec.model_dump(mode="json", by_alias=True, exclude_defaults=True),
            "inputs": files,
            "in_memory": any(map(_is_in_memory, plan.inputs.checkpoints)),
            "device": plan.device or "cpu",
            **found,
            "versions": versions(),
        }
        write_text(folder / RECORD, json.dumps(record, indent=2) + "\n")
        return files_table(files)


def _is_in_memory(checkpoint: Checkpoint) -> bool:
    """Tell whether a model, or one inside a merge, cannot be read again."""
    if isinstance(checkpoint, MergedCheckpoint):
        return any(map(_is_in_memory, checkpoint.plan.inputs.checkpoints))
    return isinstance(checkpoint, MemoryCheckpoint)


def _write_card(folder: Path, plan: Plan, files: Table) -> None:
    sources = list(dict.fromkeys(model.weights.source for model in plan.inputs.models))
    base = plan.inputs.base.source if plan.inputs.base else None
    taken = f"Taken over: {plan.donors_text}."
    added = f"Added tokens: {', '.join(f'`{token}`' for token in plan.added_tokens)}." if plan.added_tokens else ""
    tables = [table.to_markdown() for table in (_models_table(plan), files)]
    write_card(
        folder,
        f"{plan.method.name} merge of {len(plan.inputs.models)} models",
        f"Merged from {', '.join(f'`{s}`' for s in sources)}" + (f" on the base `{base}`." if base else "."),
        tags=["merge", plan.method.name],
        base=[base] if base else sources,
        spec=plan.spec.model_dump(mode="json", by_alias=True, exclude_defaults=True),
        details="\n\n".join([taken, *([added] if added else []), *tables]),
    )


def file_identity(file: Path, hashes: Hashes) -> dict[str, Any]:
    """Return a file's name, size and hash as a record holds them."""
    found: dict[str, Any] = {"file": str(file), "bytes": file.stat().st_size}
    blob = file.resolve().name
    if _HUB_HASH.fullmatch(blob):
        return found | {"sha256": blob}
    if hashes == "full":
        return found | {"sha256": file_hashes([file])[file.name]}
    return found | {"sampled_sha256": sampled_hash(file)}


def sampled_hash(file: Path) -> str:
    """Hash 64 blocks of 16 KiB that are spread over a file, the first and the last among them."""
    size, digest = file.stat().st_size, hashlib.sha256()
    with file.open("rb") as stream:
        for start in np.linspace(0, max(0, size - _BLOCK), _BLOCKS if size > _BLOCK else 1, dtype=np.int64):
            stream.seek(int(start))
            digest.update(stream.read(_BLOCK))
    return digest.hexdigest()


def _models_table(plan: Plan) -> Table:
    rows: list[Sequence[Cell]] = []
    for model in plan.inputs.models:
        adapter = model.adapter
        what = adapter.describe() if adapter else f"{len(model.weights.tensors)} tensors"
        size = adapter.nbytes if adapter else model.weights.nbytes
        rows.append([model.weights.source, what, human_bytes(size)])
    return Table(("input", "kind", "size"), rows)


def files_table(files: Sequence[Mapping[str, Any]]) -> Table:
    """Return the files of a record for a reader."""
    rows = [
        [f["file"], human_bytes(f["bytes"]), f.get("sha256") or f"{f['sampled_sha256']} (of {_BLOCKS} blocks)"]
        for f in files
    ]
    return Table(("file", "size", "SHA-256"), rows)
