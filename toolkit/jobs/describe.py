"""Say what a checkpoint, an adapter, a folder of compressed deltas or a router holds, from its headers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from copy import copy
from typing import Any

from toolkit.checkpoints.adapters import Adapter
from toolkit.checkpoints.compressed import Compressed
from toolkit.checkpoints.headers import TensorInfo
from toolkit.checkpoints.layout import Layout, role_of
from toolkit.checkpoints.reader import Checkpoint
from toolkit.tables import Cell, Table, human_bytes, human_count

Thing = Checkpoint | Adapter | Compressed | dict[str, Any]
"""Something opened; a router is its settings."""


def fine_tunes(compressed: Compressed) -> list[Compressed]:
    """Return a folder once for each of its fine-tunes, on the same opened files."""
    found = []
    for task in compressed.tasks:
        found.append(copy(compressed))
        found[-1].task = task
    return found


def numbers_of(thing: Thing) -> dict[str, Any]:
    """Return what it holds, for JSON."""
    if isinstance(thing, Checkpoint):
        return {
            "source": thing.source,
            "kind": "checkpoint",
            "architecture": thing.architecture,
            "parameters": thing.num_parameters,
            "bytes": thing.nbytes,
            "tensors": len(thing.tensors),
            "layers": Layout(thing.tensors).num_layers,
            "dtypes": dict(Counter(t.dtype.torch or t.dtype.name for t in thing.tensors.values())),
            "shards": len({t.file for t in thing.tensors.values()}),
        }
    if isinstance(thing, Adapter):
        return {
            "source": thing.source,
            "kind": "adapter",
            "description": thing.describe(),
            "base_model": thing.base_model,
            "bytes": thing.nbytes,
            "parameters": thing.store.num_parameters,
            "ranks": {module: thing.rank(module) for module in thing.parts},
            "whole": sorted(thing.whole),
            "content_hash": thing.content_hash,
        }
    if isinstance(thing, Compressed):
        return {
            "source": thing.source,
            "kind": "compressed deltas",
            "description": thing.describe(),
            "base_model": thing.base_model,
            "bytes": thing.nbytes,
            "fine_tunes": thing.tasks,
            "chosen": thing.task,
            "forms": {str(one.task): dict(Counter(map(_form, one.parts.values()))) for one in fine_tunes(thing)},
        }
    return {"kind": "router", **thing}


def table_of(thing: Thing) -> Table:
    """Return what it holds, for a reader."""
    if isinstance(thing, Checkpoint):
        return _checkpoint_table(thing)
    if isinstance(thing, Adapter):
        return _adapter_table(thing)
    if isinstance(thing, Compressed):
        return _compressed_table(thing)
    rows: list[list[Cell]] = [
        [key, ", ".join(map(str, v)) if isinstance(v, list) else str(v)] for key, v in thing.items()
    ]
    return Table(("router", thing["source"]), rows)


def _checkpoint_table(checkpoint: Checkpoint) -> Table:
    groups: dict[tuple[str, str], list[TensorInfo]] = {}
    for info in checkpoint.tensors.values():
        groups.setdefault((role_of(info.name), info.dtype.torch or info.dtype.name), []).append(info)
    rows: list[list[Cell]] = [
        [role, len(found), dtype, human_count(sum(t.count for t in found)), human_bytes(sum(t.nbytes for t in found))]
        for (role, dtype), found in groups.items()
    ]
    total = [human_count(sum(t.count for t in checkpoint.tensors.values())), human_bytes(checkpoint.nbytes)]
    rows.append(["all", len(checkpoint.tensors), "", *total])
    numbers = numbers_of(checkpoint)
    layers = ", ".join(f"{stack} x {count}" for stack, count in numbers["layers"].items())
    title = f"{checkpoint.source}: {numbers['architecture'] or 'checkpoint'}, {layers or 'no layers'}"
    return Table(("role", "tensors", "dtype", "elements", "size"), rows, title)


def _adapter_table(adapter: Adapter) -> Table:
    groups: dict[tuple[str, int, float], list[str]] = {}
    for module in adapter.parts:
        groups.setdefault((module.rpartition(".")[2], adapter.rank(module), adapter.scale(module)), []).append(module)
    rows: list[list[Cell]] = [[name, len(found), rank, f"{scale:g}"] for (name, rank, scale), found in groups.items()]
    title = (
        f"{adapter.source}: {adapter.describe()}, {human_bytes(adapter.nbytes)}, base {adapter.base_model or 'unknown'}"
    )
    return Table(("module", "layers", "rank", "scale"), rows, title)


_FORMS = {"mask": "mask", "signs": "signs", "levels": "levels", "rows": "low-rank"}


def _form(parts: Mapping[str, str]) -> str:
    """Name the form that a tensor is held in by its characteristic part."""
    return next((form for part, form in _FORMS.items() if part in parts), next(iter(parts)))


def _compressed_table(compressed: Compressed) -> Table:
    store = compressed.store
    groups: dict[tuple[str, str], list[int]] = {}
    shared: dict[str, int] = {}
    for one in fine_tunes(compressed):
        for parts in one.parts.values():
            own = sum(store.info(stored).nbytes for part, stored in parts.items() if part != "vector")
            groups.setdefault((str(one.task), _form(parts)), []).append(own)
            shared |= {stored: store.info(stored).nbytes for part, stored in parts.items() if part == "vector"}
    if shared:
        groups["all", "vector"] = list(shared.values())
    rows: list[list[Cell]] = [
        [task, form, len(sizes), human_bytes(sum(sizes))] for (task, form), sizes in groups.items()
    ]
    kind, base = compressed.config.get("kind", "deltas"), compressed.base_model or "unknown"
    title = f"{compressed.source}: compressed deltas ({kind}), {human_bytes(compressed.nbytes)}, base {base}"
    return Table(("fine-tune", "form", "tensors", "size"), rows, title)
