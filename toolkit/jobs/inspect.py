"""Say what checkpoints, adapters, compressed deltas and routers hold, whether they fit, and how their deltas differ."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolkit.checkpoints.adapters import Adapter, is_adapter, open_adapter
from toolkit.checkpoints.compressed import Compressed, CompressedDelta, is_compressed, open_compressed, split_task
from toolkit.checkpoints.deltas import AdapterDelta, Delta, DenseDelta
from toolkit.checkpoints.locate import locate
from toolkit.checkpoints.reader import Checkpoint, open_checkpoint, read_json
from toolkit.checkpoints.tokenizers import other_tokens_of
from toolkit.errors import CheckpointError, SpecError, UnsupportedError
from toolkit.jobs import describe
from toolkit.jobs.conflicts import numbers_of, tables_of
from toolkit.jobs.describe import Thing, fine_tunes
from toolkit.merge.compare import compare
from toolkit.merge.conflicts import Comparison
from toolkit.models.load import LoadedModel
from toolkit.routing.router import Router
from toolkit.tables import Cell, Report, Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RANKS = (1, 8, 16)
"""Ranks at which the energy of deltas is measured where none are asked for."""


@dataclass(frozen=True)
class Inspection(Report):
    """What was found; `numbers["compatible"]` tells whether several models fit together.

    Attributes:
        comparison: of the deltas, where they were measured.
    """

    comparison: Comparison | None = None

    def figure(self) -> Figure:
        """Draw the deltas.

        Raises:
            UnsupportedError: they were not measured, or matplotlib is not installed.
        """
        from toolkit.jobs.plots import check_matplotlib, draw

        if self.comparison is None:
            raise UnsupportedError("no deltas were measured; pass deltas=True, or base=")
        check_matplotlib()
        return draw(self.comparison)


def inspect(
    *sources: Any,
    base: Any = None,
    deltas: bool = False,
    energy: bool = True,
    ranks: Sequence[int] | None = None,
    plot: str | Path | None = None,
    overwrite: bool = False,
    allow_pickle: bool = False,
    quiet: bool = False,
) -> Inspection:
    """Describe models and changes of them, compare them with the first, and measure what they changed of a base.

    Headers alone are read, unless `base`, `deltas`, `ranks` or `plot` asks to measure. Then every delta from the base
    is read once, and once more for its singular values; see `toolkit.merge.conflicts` for what is measured. What does
    not fit the base is not measured.

    Args:
        sources: folders, files, hub ids, transformers models, pairs `(model, tokenizer)`, or routers.
        base: of the deltas, put before the sources; without it the first source, or the base that it names.
        deltas: measure them.
        energy: measure how much of them the top ranks hold, which needs the singular values of every matrix.
        ranks: at which to measure that; 1, 8 and 16 by default.
        plot: file to draw them into: `.png`, `.svg` or `.pdf`.
        overwrite: replace `plot` if it exists.
        allow_pickle: also read pickled checkpoints, with `weights_only`.
        quiet: show no progress.

    Raises:
        ToolkitError: one of them is missing or broken, nothing can be measured, or the plot cannot be written.
    """
    measured = deltas or any(option is not None for option in (base, ranks, plot))
    wanted = _wanted_ranks(ranks, energy)
    target = Path(plot) if plot is not None else None
    if target:
        from toolkit.jobs.plots import check_plot

        check_plot(target, overwrite=overwrite)
    with ExitStack() as stack:
        opened = _open_all(base, sources, allow_pickle, stack)
        if measured:
            opened = _with_base(opened, base is not None, allow_pickle, stack)
        report = _describe_all(opened)
        comparison = _measure(opened, wanted, quiet) if measured else None
    if comparison is None:
        return Inspection(report.numbers, report.tables)
    if target:
        from toolkit.jobs.plots import save_plot

        save_plot(comparison, target)
    numbers = {**report.numbers, "deltas": numbers_of(comparison)}
    return Inspection(numbers, [*report.tables, *tables_of(comparison)], comparison)


def _wanted_ranks(ranks: Sequence[int] | None, energy: bool) -> Sequence[int]:
    if ranks is None:
        return RANKS if energy else ()
    if not energy:
        raise SpecError("ranks: are of the energy, which is not to be measured")
    bad = [rank for rank in ranks if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1]
    if bad or not ranks:
        given = bad[0] if bad else "none"
        raise SpecError(f"ranks: expected whole numbers above 0, such as 1, 8 and 16, got {given}")
    return ranks


def _open_all(base: Any, sources: Sequence[Any], allow_pickle: bool, stack: ExitStack) -> list[Thing]:
    """Open everything, the base first; as in a merge, the base among the models takes no part."""
    others = [source for source in sources if base is None or not _same(source, base)]
    opened: list[Thing] = []
    for source in others if base is None else [base, *others]:
        opened.append(_open(source, allow_pickle))
        if not isinstance(opened[-1], dict):
            stack.callback(opened[-1].close)
    return opened


def _same(source: Any, base: Any) -> bool:
    return source is base or (
        isinstance(source, str | Path) and isinstance(base, str | Path) and str(source) == str(base)
    )


def _with_base(opened: Sequence[Thing], named: bool, allow_pickle: bool, stack: ExitStack) -> list[Thing]:
    """Return the base of the deltas and the models: the first, or, unless the user named it, the one that it names."""
    if not opened or isinstance(opened[0], Checkpoint):
        return [*opened]
    first = opened[0]
    if isinstance(first, Adapter | Compressed) and first.base_model and not named:
        return [stack.enter_context(open_checkpoint(first.base_model, allow_pickle=allow_pickle)), *opened]
    source = first["source"] if isinstance(first, dict) else first.source
    raise UnsupportedError(
        f"{source}: no full model, which deltas are taken from; put one first, or name it with --base"
    )


def _describe_all(opened: Sequence[Thing]) -> Report:
    tables = [describe.table_of(thing) for thing in opened]
    numbers: dict[str, Any] = {"sources": [describe.numbers_of(thing) for thing in opened]}
    if len(opened) > 1:
        faults = [fault for other in opened[1:] for fault in _misfits(opened[0], other)]
        numbers |= {"compatible": not faults, "faults": faults}
        rows: list[list[Cell]] = [[fault] for fault in faults] or [["all fit together"]]
        tables.append(Table(("compatible: " + ("no" if faults else "yes"),), rows))
    return Report(numbers, tables)


def _measure(opened: Sequence[Thing], ranks: Sequence[int], quiet: bool) -> Comparison | None:
    """Measure the deltas that fit the first of the models; `None` if none does."""
    if len(opened) < 2:
        raise UnsupportedError("deltas are taken of models and adapters besides the base; name at least one")
    base, *others = opened
    assert isinstance(base, Checkpoint)
    fitting = [delta for other in others if not _misfits(base, other) for delta in _deltas(base, other)]
    return compare(base, fitting, ranks, quiet=quiet) if fitting else None


def _deltas(base: Checkpoint, other: Thing) -> list[Delta]:
    """Return what a model, an adapter or each of several compressed fine-tunes changed of a base.

    Raises:
        CheckpointError: a change that does not fit the base.
    """
    if isinstance(other, Checkpoint):
        return [DenseDelta(base, other)]
    if isinstance(other, Adapter):
        return [AdapterDelta(base, other)]
    assert isinstance(other, Compressed)
    return [CompressedDelta(base, one) for one in ([other] if other.task else fine_tunes(other))]


def _open(source: Any, allow_pickle: bool) -> Thing:
    if isinstance(source, Router):
        return {"source": "a router in memory", **source.to_dict()}
    if isinstance(source, LoadedModel):
        source = source.model
    elif isinstance(source, tuple) and source:
        source = source[0]
    if isinstance(source, str | Path):
        place = split_task(str(source))[0]
        path = locate(Path(place) if isinstance(source, Path) else place, allow_pickle=allow_pickle)
        if is_compressed(path):
            return open_compressed(source)
        if path.is_dir() and is_adapter(path):
            return open_adapter(source)
        if path.is_dir() and (path / "router.json").is_file():
            return {"source": str(source), **read_json(path / "router.json")}
    return open_checkpoint(source, allow_pickle=allow_pickle)


def _misfits(first: Thing, other: Thing) -> Sequence[str]:
    """Say why two things cannot be composed."""
    if isinstance(first, Checkpoint) and isinstance(other, Checkpoint):
        return _different_tensors(first, other)
    if isinstance(other, Checkpoint):
        first, other = other, first
    if isinstance(first, dict) or isinstance(other, dict):
        return ["a router is not composed with weights"]
    if isinstance(first, Checkpoint):
        try:
            _deltas(first, other)
        except CheckpointError as error:
            return [str(error)]
        return []
    assert not isinstance(other, Checkpoint)
    return _different_changes(first, other)


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
    tokens = other_tokens_of(first.folder, other.folder)
    return [*faults, f"{other.source}: {tokens} in {first.source}"] if tokens else faults


def _different_changes(first: Adapter | Compressed, other: Adapter | Compressed) -> list[str]:
    faults = []
    if first.base_model and other.base_model and first.base_model != other.base_model:
        faults.append(f"{other.source} names the base {other.base_model}, {first.source} names {first.base_model}")
    if isinstance(first, Compressed) or isinstance(other, Compressed):
        return faults
    common = [module for module in first.parts if module in other.parts]
    different = next((m for m in common if first.shape(m) != other.shape(m)), None)
    if different:
        given, wanted = list(other.shape(different)), list(first.shape(different))
        faults.append(f"{other.source}: {different} is {given}, not {wanted}")
    return faults
