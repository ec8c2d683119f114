"""Say what a checkpoint, an adapter or a router holds, and whether several fit together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toolkit.checkpoints.adapters import Adapter, is_adapter, open_adapter
from toolkit.checkpoints.deltas import AdapterDelta
from toolkit.checkpoints.headers import TensorInfo
from toolkit.checkpoints.layout import Layout, role_of
from toolkit.checkpoints.locate import locate
from toolkit.checkpoints.reader import Checkpoint, open_checkpoint, read_json
from toolkit.errors import CheckpointError
from toolkit.models.load import LoadedModel
from toolkit.routing.router import Router
from toolkit.tables import Cell, Report, Table, human_bytes, human_count


@dataclass(frozen=True)
class Inspection(Report):
    """What was found; `numbers["compatible"]` tells whether several models fit together."""


def inspect(*sources: Any, allow_pickle: bool = False) -> Inspection:
    """Describe models, adapters and routers from their headers; compare the second and later ones with the first.

    Args:
        sources: folders, files, hub ids, transformers models, pairs `(model, tokenizer)`, or routers.
        allow_pickle: also read pickled checkpoints, with `weights_only`.

    Raises:
        ToolkitError: one of them is missing or broken.
    """
    opened = [_open(source, allow_pickle) for source in sources]
    tables = [table for thing in opened for table in _describe(thing)]
    numbers: dict[str, Any] = {"sources": [_numbers(thing) for thing in opened]}
    if len(opened) > 1:
        faults = [fault for other in opened[1:] for fault in _misfits(opened[0], other)]
        numbers |= {"compatible": not faults, "faults": faults}
        rows: list[list[Cell]] = [[fault] for fault in faults] or [["all fit together"]]
        tables.append(Table(("compatible: " + ("no" if faults else "yes"),), rows))
    for thing in opened:
        if isinstance(thing, Checkpoint | Adapter):
            thing.close()
    return Inspection(numbers, tables)


_Thing = Checkpoint | Adapter | dict[str, Any]


def _open(source: Any, allow_pickle: bool) -> _Thing:
    if isinstance(source, Router):
        return {"source": "a router in memory", **source.to_dict()}
    if isinstance(source, LoadedModel):
        source = source.model
    elif isinstance(source, tuple) and source:
        source = source[0]
    if isinstance(source, str | Path):
        path = locate(source)
        if path.is_dir() and is_adapter(path):
            return open_adapter(source)
        if path.is_dir() and (path / "router.json").is_file():
            return {"source": str(source), **read_json(path / "router.json")}
    return open_checkpoint(source, allow_pickle=allow_pickle)


def _numbers(thing: _Thing) -> dict[str, Any]:
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
    return {"kind": "router", **thing}


def _describe(thing: _Thing) -> list[Table]:
    if isinstance(thing, Checkpoint):
        return [_checkpoint_table(thing)]
    if isinstance(thing, Adapter):
        return [_adapter_table(thing)]
    rows: list[list[Cell]] = [
        [key, ", ".join(map(str, v)) if isinstance(v, list) else str(v)] for key, v in thing.items()
    ]
    return [Table(("router", thing["source"]), rows)]


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
    numbers = _numbers(checkpoint)
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


def _misfits(first: _Thing, other: _Thing) -> Sequence[str]:
    """Say why two things cannot be composed."""
    if isinstance(first, Checkpoint) and isinstance(other, Checkpoint):
        return _different_tensors(first, other)
    if isinstance(first, Adapter) and isinstance(other, Checkpoint):
        first, other = other, first
    if isinstance(first, Checkpoint) and isinstance(other, Adapter):
        try:
            AdapterDelta(first, other)
        except CheckpointError as error:
            return [str(error)]
        return []
    if isinstance(first, Adapter) and isinstance(other, Adapter):
        return _different_adapters(first, other)
    return ["a router is not composed with weights"]


def _different_tensors(first: Checkpoint, other: Checkpoint) -> list[str]:
    lacking = [name for name in first.tensors if not other.has(name)]
    extra = [name for name in other.tensors if not first.has(name)]
    shapes = [n for n in first.tensors if n not in lacking and other.info(n).shape != first.info(n).shape]
    faults = []
    if lacking:
        faults.append(f"{other.source} lacks {lacking[0]} ({len(lacking)} such tensors)")
    if extra:
        faults.append(f"{other.source} has {extra[0]} besides ({len(extra)} such tensors)")
    if shapes:
        name = shapes[0]
        given, wanted = list(other.info(name).shape), list(first.info(name).shape)
        faults.append(f"{other.source}: {name} is {given}, not {wanted} ({len(shapes)} such tensors)")
    return faults


def _different_adapters(first: Adapter, other: Adapter) -> list[str]:
    faults = []
    if first.base_model and other.base_model and first.base_model != other.base_model:
        faults.append(f"{other.source} names the base {other.base_model}, {first.source} names {first.base_model}")
    common = [module for module in first.parts if module in other.parts]
    different = next((m for m in common if first.shape(m) != other.shape(m)), None)
    if different:
        given, wanted = list(other.shape(different)), list(first.shape(different))
        faults.append(f"{other.source}: {different} is {given}, not {wanted}")
    return faults
