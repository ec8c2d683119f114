"""Align a model to another that shares no base with it, and measure the barrier between them before and after."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from toolkit.checkpoints.companions import copy_companions, write_card, write_config
from toolkit.checkpoints.deltas import chunks
from toolkit.checkpoints.reader import Checkpoint, open_checkpoint
from toolkit.checkpoints.tokenizers import read_tokenizer
from toolkit.checkpoints.writer import SHARD_BYTES, WeightsWriter, check_free, check_space, plan_shards, staged
from toolkit.errors import MissingError, Problem, SpecError, UnsupportedError
from toolkit.merge.align.weight_matching import SWEEPS, Alignment
from toolkit.merge.align.weight_matching import align as match
from toolkit.progress import track
from toolkit.tables import Cell, Report, Table


@dataclass(frozen=True)
class AlignResult(Report):
    """An aligned model.

    Attributes:
        path: folder that was written.
        permutations: by group: `aligned[i] = model[permutation[i]]`.
    """

    path: Path = Path()
    permutations: Mapping[str, Any] = field(default_factory=dict)


def align(
    reference: Any,
    model: Any,
    out: str | Path,
    *,
    seed: int = 0,
    sweeps: int = SWEEPS,
    residual: bool = True,
    singular_vectors: bool = False,
    data: str | Path | Sequence[str | Path] | None = None,
    limit: int | None = None,
    points: int = 11,
    by_layer: bool = False,
    device: str = "auto",
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
    shard_bytes: int = SHARD_BYTES,
    overwrite: bool = False,
    quiet: bool = False,
) -> AlignResult:
    """Permute a model's units to match a reference's, by weight matching, and write it; it computes what it did.

    Several models are aligned to one common reference, each by a call of its own.

    Args:
        reference: folder, hub id or transformers model that stays as it is.
        model: to align; of the same architecture, sizes and vocabulary.
        out: folder to write; it appears only when it is whole.
        seed: of the order in which groups of units take turns.
        sweeps: most turns of all groups; it stops earlier when none can be improved.
        residual: also permute the residual stream, not only heads and hidden units.
        singular_vectors: also report how well singular vectors agree; decomposes every matrix of the layers.
        data: JSONL files; measure the barrier on them, along the line from the reference to the model.
        limit: first rows of the data to take; by default all.
        points: of the line, both ends included.
        by_layer: also measure the middle of the line of each layer, all else as in the reference.
        device: to measure on.
        trust_remote_code: run code that comes with the models, to measure.
        allow_pickle: also read pickled checkpoints, with `weights_only`.
        shard_bytes: largest size of an output file.
        overwrite: replace `out` if it exists.
        quiet: show no progress.

    Raises:
        SpecError: an option that cannot be.
        UnsupportedError: an architecture that is not known, or models that differ in more than their weights.
        OutputError: `out` exists, or cannot be written.
    """
    started, out = time.perf_counter(), Path(out)
    _check(reference, model, sweeps=sweeps, points=points, limit=limit, by_layer=by_layer, data=data)
    check_free(out, overwrite=overwrite)
    settings: dict[str, Any] = {"seed": seed, "sweeps": sweeps, "residual": residual}
    ruler = None
    if data is not None:
        from toolkit.jobs.barrier import Ruler

        options: dict[str, Any] = {"device": device, "trust_remote_code": trust_remote_code}
        ruler = Ruler(data, limit=limit, points=points, by_layer=by_layer, **options)
    with ExitStack() as files:
        first, second = (files.enter_context(closing(_open(m, allow_pickle))) for m in (reference, model))
        _check_vocabularies(first, second)
        found = match(first, second, **settings, quiet=quiet)
        with staged(out, overwrite=overwrite) as partial:
            _write_weights(found.view, partial, shard_bytes, quiet)
            numbers, tables = _summary(found, first, second, out)
            if singular_vectors:
                _add_singular(numbers, tables, found, first)
            if ruler:
                barriers = ruler.measure(reference, model, partial, quiet=quiet)
                numbers["barrier"] = barriers.to_dict()
                tables += barriers.tables()
            numbers["seconds"] = round(time.perf_counter() - started, 3)
            result = AlignResult(numbers, tables, out, found.permutations)
            _write_card(partial, result, settings)
    return result


def _check(reference: Any, model: Any, **options: Any) -> None:
    """Refuse options that cannot be, before anything is read."""
    problems = [
        Problem(name, f"expected at least {least}, got {options[name]}")
        for name, least in (("sweeps", 1), ("points", 3), ("limit", 1))
        if options[name] is not None and options[name] < least
    ]
    if options["by_layer"] and options["data"] is None:
        problems.append(Problem("by_layer", "needs data to measure the barrier on"))
    if options["data"] is not None and not all(isinstance(m, str | Path) for m in (reference, model)):
        problems.append(Problem("data", "the barrier is measured between models on disk, with their tokenizer"))
    if problems:
        raise SpecError(problems)


def _open(source: Any, allow_pickle: bool) -> Checkpoint:
    return open_checkpoint(source, allow_pickle=allow_pickle)


def _check_vocabularies(reference: Checkpoint, other: Checkpoint) -> None:
    """Refuse models whose tokens differ: the rows of their embeddings are matched by number."""
    try:
        known, given = (read_tokenizer(model.folder, model.source).vocabulary for model in (reference, other))
    except MissingError:
        return
    if known != given:
        token = next(iter(sorted(known.items() ^ given.items())))[0]
        raise UnsupportedError(
            f"{other.source} cannot be aligned to {reference.source}: their tokenizers differ, as in {token!r};"
            " give both one vocabulary first, by a merge of one model with a tokenizer block"
        )


def _write_weights(view: Checkpoint, folder: Path, shard_bytes: int, quiet: bool) -> None:
    check_space(folder, view.nbytes)
    writer = WeightsWriter(folder, plan_shards(list(view.tensors.values()), shard_bytes))
    try:
        with track("writing", view.nbytes, unit="B", quiet=quiet) as progress:
            for name, info in view.tensors.items():
                for start, stop in chunks(info.shape):
                    writer.write(name, start, view.read_raw(name, start, stop))
                progress.advance(info.nbytes)
        writer.flush()
        writer.write_index()
    finally:
        writer.close()
    write_config(view, folder, None)
    if view.folder:
        copy_companions(view.folder, folder)


_Numbers = dict[str, Any]


def _summary(found: Alignment, reference: Checkpoint, other: Checkpoint, out: Path) -> tuple[_Numbers, list[Table]]:
    before, after = found.distances
    numbers: _Numbers = {
        "path": str(out),
        "reference": reference.source,
        "model": other.source,
        "objective": list(found.objective),
        "distance": {"before": before, "after": after},
        "moved": found.moved,
    }
    moved = ", ".join(f"{share:.0%} of {_KINDS[kind]}" for kind, share in found.moved.items())
    rows: list[list[Cell]] = [
        ["aligned", f"{other.source} to {reference.source}"],
        ["moved", moved],
        ["sweeps", len(found.objective) - 2],
        ["inner product", f"{found.objective[0]:.6g} to {found.objective[-1]:.6g}"],
        ["relative distance", f"{before:.4g} to {after:.4g}"],
    ]
    return numbers, [Table(("align", str(out)), rows)]


_KINDS = {"residual": "residual features", "mlp": "hidden units", "attention": "heads"}


def _add_singular(numbers: _Numbers, tables: list[Table], found: Alignment, reference: Checkpoint) -> None:
    from toolkit.merge.align.singular import singular_alignment

    before, after = singular_alignment(reference, found.view.inner, found.view)
    numbers["singular_alignment"] = {"before": before, "after": after}
    tables.append(Table(("agreement of singular vectors", "value"), [["before", before], ["after", after]], digits=4))


def _write_card(folder: Path, result: AlignResult, settings: Mapping[str, Any]) -> None:
    reference, model = result.numbers["reference"], result.numbers["model"]
    write_card(
        folder,
        f"{Path(model).name} aligned to {Path(reference).name}",
        f"`{model}` with its units permuted to match those of `{reference}` by weight matching; it computes what"
        f" `{model}` does.",
        tags=["align", "weight-matching"],
        base=[model],
        spec={"reference": reference, "model": model, **settings},
        details="\n\n".join(table.to_markdown() for table in result.tables),
        libraries=("scipy",),
    )
