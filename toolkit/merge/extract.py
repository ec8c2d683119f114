"""Turn fine-tunes into small changes of their base: a LoRA, masks over one shared vector, signs, or low-rank pairs."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from math import sqrt
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BeforeValidator, Field, field_validator, model_validator

from toolkit import specs
from toolkit.checkpoints.adapters import Adapter
from toolkit.checkpoints.companions import write_card
from toolkit.checkpoints.compressed import Compressed, CompressedDelta, is_task_name
from toolkit.checkpoints.deltas import AdapterDelta, Delta
from toolkit.checkpoints.dtypes import DTYPES, DType, Floats, by_torch_name
from toolkit.checkpoints.layout import role_of
from toolkit.checkpoints.writer import check_free, staged
from toolkit.errors import Problem, UnsupportedError
from toolkit.merge.changes import Changes, Key
from toolkit.merge.compress import RankRule, plan_masks, plan_pairs, plan_signs
from toolkit.merge.lora import plan_lora, write_lora
from toolkit.merge.parameters import matches
from toolkit.merge.plan import Plan
from toolkit.merge.record import file_identity, files_table
from toolkit.merge.spec import MergeSpec, Model  # noqa: F401 - pydantic looks up the name that Model mentions
from toolkit.progress import track
from toolkit.specs import Size, Spec
from toolkit.tables import Cell, Report, Table, human_bytes

Kind = Literal["lora", "svd", "mask", "bit"]
RANK = 16
"""Rank where none is asked for."""

WORST = 10
"""Tensors that the report shows."""

_OWN_OPTIONS = {
    "rank": ("lora", "svd"),
    "energy": ("lora", "svd"),
    "budget": ("lora", "svd"),
    "dtype": ("lora", "svd", "mask"),
    "lambdas": ("mask",),
    "scale": ("bit",),
}


def _named(value: Any) -> Any:
    """Give every fine-tune a name: the last part of its path, unless the spec names it."""
    if isinstance(value, Mapping):
        return dict(value)
    models = value if isinstance(value, list | tuple) else [value]
    names = [_name_of(model) for model in models]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice:
        raise ValueError(f"two fine-tunes would be called {twice!r}; name them, as in {{{twice}: PATH}}")
    return dict(zip(names, models, strict=True))


def _name_of(model: Any) -> str:
    if not isinstance(model, str | Path):
        return type(model).__name__
    return re.split(r"[/\\#+]", str(model).rstrip("/\\"))[-1]


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, int | float | str) else value


class ExtractSpec(Spec):
    """What to extract, and how.

    Attributes:
        base: model that the fine-tunes started from.
        tuned: one fine-tune, a list of them, or name -> model: whatever a merge takes as a model.
        kind: `as` in a spec: `lora`, a PEFT folder of one fine-tune; `svd`, low-rank pairs of matrices of any kind;
            `mask`, one vector and a mask per fine-tune; `bit`, signs and scales.
        rank: lora, svd: of every pair, or `full`; 16 by default.
        energy: lora, svd: instead, the share of each change's squared Frobenius norm that is kept.
        budget: lora, svd: instead, bytes of all that is written, such as `20MB`, spread to the least total error.
        lambdas: `lambda` in a spec; mask: of all fine-tunes, or one of each. Larger ones keep less.
        scale: bit: one per `row` or one per `tensor`.
        embeddings: treat embeddings and output heads as other matrices are; by default for svd and mask.
        keep: filters, as in a merge's parameters; tensors that are kept whole although they are matrices.
        dtype: of factors (float32 by default) and of the vector (by default each tensor's own).
        allow_pickle: also read pickled checkpoints, with `weights_only`.
    """

    base: Model
    tuned: Annotated[dict[str, Model], BeforeValidator(_named), Field(min_length=1)]
    kind: Kind = Field("lora", alias="as")
    rank: Annotated[int, Field(ge=1)] | Literal["full"] | None = None
    energy: Annotated[float, Field(gt=0, le=1)] | None = None
    budget: Size | None = None
    lambdas: Annotated[
        list[Annotated[float, Field(ge=0, allow_inf_nan=False)]], BeforeValidator(_as_list), Field(min_length=1)
    ] = Field([1.0], alias="lambda")
    scale: Literal["row", "tensor"] = "row"
    embeddings: bool | None = None
    keep: Annotated[list[str], BeforeValidator(_as_list)] = Field(default_factory=list)
    dtype: str | None = None
    allow_pickle: bool = False

    @field_validator("tuned")
    @classmethod
    def _names(cls, tuned: dict[str, Any]) -> dict[str, Any]:
        for name in tuned:
            if not is_task_name(name):
                raise ValueError(f"a fine-tune cannot be called {name!r}; name it of letters, digits, '.', '_' and '-'")
        return tuned

    @field_validator("dtype")
    @classmethod
    def _floating(cls, name: str | None) -> str | None:
        try:
            floating = name is None or by_torch_name(name).floating
        except UnsupportedError as error:
            raise ValueError(str(error)) from None
        if not floating:
            raise ValueError("cannot hold weights")
        return name

    @model_validator(mode="after")
    def _fitting(self) -> ExtractSpec:
        for name, kinds in _OWN_OPTIONS.items():
            if name in self.model_fields_set and getattr(self, name) is not None and self.kind not in kinds:
                raise ValueError(f"{name.removesuffix('s')} is an option of {' and '.join(kinds)}, not of {self.kind}")
        if sum(value is not None for value in (self.rank, self.energy, self.budget)) > 1:
            raise ValueError("give one of rank, energy and budget")
        if self.kind == "lora" and len(self.tuned) > 1:
            raise ValueError("one LoRA folder holds one fine-tune; extract several as svd, mask or bit")
        if len(self.lambdas) not in (1, len(self.tuned)):
            raise ValueError(f"lambda is one number, or one for each of {len(self.tuned)} fine-tunes")
        return self

    @property
    def rank_rule(self) -> RankRule:
        """How many singular values are kept."""
        rank = RANK if self.rank is None else 1 << 62 if self.rank == "full" else self.rank
        return RankRule(rank if self.energy is None and self.budget is None else None, self.energy, self.budget)

    @property
    def lambda_of_each(self) -> dict[str, float]:
        """`lambda` of each fine-tune."""
        values = self.lambdas * len(self.tuned) if len(self.lambdas) == 1 else self.lambdas
        return dict(zip(self.tuned, values, strict=True))

    @property
    def number_format(self) -> DType | None:
        """`dtype` as a storage format."""
        return None if self.dtype is None else by_torch_name(self.dtype)

    def is_compressed(self, changes: Changes) -> Callable[[str], bool]:
        """Return what tells whether a tensor is held approximately."""
        embeddings = self.kind in ("svd", "mask") if self.embeddings is None else self.embeddings

        def answer(name: str) -> bool:
            if len(changes.shape(name)) < 2 or any(matches(pattern, name) for pattern in self.keep):
                return False
            return embeddings or role_of(name) not in ("embedding", "head")

        return answer


@dataclass(frozen=True)
class Extraction(Report):
    """What was extracted.

    Attributes:
        path: folder that was written.
        errors: fine-tune -> tensor -> relative error in the Frobenius norm, of what was written, read back.
    """

    path: Path = Path()
    errors: Mapping[str, Mapping[str, float]] = field(default_factory=dict)


def extract(
    base: object,
    tuned: object,
    out: str | Path,
    *,
    kind: Kind = "lora",
    overwrite: bool = False,
    quiet: bool = False,
    **options: Any,
) -> Extraction:
    """Write what fine-tunes changed of their base as a small folder, and report how exact it is.

    Args:
        base: model that the fine-tunes started from.
        tuned: one fine-tune, a list of them, or name -> model.
        out: folder to write; it appears only when it is whole.
        kind: `lora`, `svd`, `mask` or `bit`.
        overwrite: replace `out` if it exists.
        quiet: show no progress.
        options: further keys of `ExtractSpec`, such as `rank=8` or `budget="20MB"`.

    Raises:
        SpecError: wrong options, or models that do not fit together.
        UnsupportedError: nothing was changed, or something that this kind cannot hold.
        OutputError: `out` exists, or cannot be written.
    """
    spec = {"base": base, "tuned": tuned, "as": kind} | options
    return run_extract(spec, out, overwrite=overwrite, quiet=quiet)


def run_extract(
    spec: specs.Source | ExtractSpec,
    out: str | Path,
    *,
    overwrite: bool = False,
    card: bool = True,
    record: Callable[[Plan, Path], Table] | None = None,
    quiet: bool = False,
) -> Extraction:
    """Do what a spec says; see `extract`.

    Args:
        spec: a YAML file, a dict or an `ExtractSpec`.
        out: folder to write.
        overwrite: replace `out` if it exists.
        card: write a model card.
        record: writes by what a merge is verified, and returns the inputs' files for the card.
        quiet: show no progress.
    """
    started = time.perf_counter()
    loaded, out = specs.load(spec, ExtractSpec), Path(out)
    check_free(out, overwrite=overwrite)
    if loaded.base in loaded.tuned.values():
        raise loaded.error([Problem("tuned", "is the base itself")])
    changes = Changes(loaded.base, loaded.tuned, allow_pickle=loaded.allow_pickle)
    try:
        with track("comparing", changes.read_bytes, unit="B", quiet=quiet) as progress:
            changes.survey(progress)
        if not changes.norms:
            raise UnsupportedError(f"{', '.join(changes.sources.values())}: nothing differs from {changes.base.source}")
        with staged(out, overwrite=overwrite) as partial:
            compressed = _write(loaded, changes, partial, quiet)
            errors = _measure(loaded, changes, partial, quiet)
            size = sum(file.stat().st_size for file in partial.glob("*.safetensors"))
            outcome = _Outcome(changes, compressed, errors, size)
            result = _report(loaded, outcome, out, time.perf_counter() - started)
            files = (record or _files)(changes.plan, partial)
            if card:
                _write_card(loaded, changes, partial, result, files)
    finally:
        changes.close()
    return result


def _write(spec: ExtractSpec, changes: Changes, folder: Path, quiet: bool) -> list[Key]:
    """Write the folder; return what is held approximately."""
    is_compressed, rule, dtype = spec.is_compressed(changes), spec.rank_rule, spec.number_format
    passes = 1 if rule.rank is not None else 2
    with track("extracting", passes * changes.read_bytes, unit="B", quiet=quiet) as progress:
        if spec.kind == "lora":
            plan = plan_lora(changes, is_compressed)
            write_lora(folder, changes, plan, rule, dtype or DTYPES["F32"], progress)
            return [(name, changes.tasks[0]) for name in plan.matrices]
        if spec.kind == "svd":
            plan = plan_pairs(changes, is_compressed, rule, dtype or DTYPES["F32"], progress)
        elif spec.kind == "mask":
            plan = plan_masks(changes, is_compressed, spec.lambda_of_each, dtype)
        else:
            plan = plan_signs(changes, is_compressed, spec.scale == "row")
        plan.write(folder, changes, progress)
        return plan.compressed


def _measure(spec: ExtractSpec, changes: Changes, folder: Path, quiet: bool) -> dict[Key, float]:
    """Return the norm of the error of every change: of what was written, read as any other tool reads it."""
    squares = dict.fromkeys(changes.norms, 0.0)
    with ExitStack() as stack, track("checking", changes.read_bytes, unit="B", quiet=quiet) as progress:
        written = {task: _open_written(spec, changes, folder, task, stack) for task in changes.tasks}
        for name, job in changes.jobs.items():
            for start, x in changes.slices(name):
                _add_squares(squares, changes, written, name, start, x)
            progress.advance(job.read_bytes)
    return {key: sqrt(square) for key, square in squares.items()}


def _open_written(spec: ExtractSpec, changes: Changes, folder: Path, task: str, stack: ExitStack) -> Delta:
    if spec.kind == "lora":
        adapter = stack.enter_context(closing(Adapter(folder)))
        return AdapterDelta(changes.base, adapter)
    compressed = stack.enter_context(closing(Compressed(folder, task=task)))
    return CompressedDelta(changes.base, compressed)


def _add_squares(
    squares: dict[Key, float], changes: Changes, written: Mapping[str, Delta], name: str, start: int, x: Floats
) -> None:
    base, got = np.empty(x.shape[1], np.float32), np.empty(x.shape[1], np.float32)
    changes.base.read(name, start, start + len(base), base)
    for (task, delta), change in zip(written.items(), x, strict=True):
        if (name, task) in squares:
            delta.read(name, start, start + len(base), base, got)
            squares[name, task] += float(np.square(np.subtract(got, change, out=got), dtype=np.float64).sum())


@dataclass(frozen=True)
class _Outcome:
    """What an extraction reached."""

    changes: Changes
    compressed: Sequence[Key]
    errors: Mapping[Key, float]
    size: int

    def total(self, task: str) -> float:
        """Return the relative error of all that a fine-tune changed."""
        keys = [key for key in self.errors if key[1] == task]
        norm = sqrt(sum(self.changes.norms[key] ** 2 for key in keys))
        return sqrt(sum(self.errors[key] ** 2 for key in keys)) / norm if norm else 0.0

    def relative(self) -> dict[Key, float]:
        """Return the relative error of every change."""
        return {key: error / self.changes.norms[key] for key, error in self.errors.items()}


def _report(spec: ExtractSpec, outcome: _Outcome, out: Path, seconds: float) -> Extraction:
    changes, relative = outcome.changes, outcome.relative()
    errors = {t: {name: error for (name, task), error in relative.items() if task == t} for t in changes.tasks}
    totals = {task: outcome.total(task) for task in changes.tasks}
    numbers = {
        "path": str(out),
        "as": spec.kind,
        "base": changes.base.source,
        "fine_tunes": changes.sources,
        "compressed": len(outcome.compressed),
        "whole": len(changes.norms) - len(outcome.compressed),
        "bytes_before": changes.nbytes,
        "bytes_after": outcome.size,
        "relative_error": totals,
        "relative_error_of_tensors": errors,
        "seconds": round(seconds, 3),
    }
    sizes = human_bytes(changes.nbytes), human_bytes(outcome.size), f"{changes.nbytes / outcome.size:.1f}"
    rows: list[list[Cell]] = [
        ["as", spec.kind],
        ["changed tensors held approximately", numbers["compressed"]],
        ["changed tensors kept whole", numbers["whole"]],
        ["size", "{} to {}, {} times smaller".format(*sizes)],
        *([f"relative error of {task}", f"{error:.3g}"] for task, error in totals.items()),
    ]
    worst = sorted(outcome.compressed, key=lambda key: -relative[key])[:WORST]
    shown: list[list[Cell]] = [
        [name, task, " x ".join(map(str, changes.shape(name))), f"{relative[name, task]:.3g}"] for name, task in worst
    ]
    tables = [Table(("extract", str(out)), rows)]
    if shown:
        tables.append(Table(("tensor", "fine-tune", "shape", "relative error"), shown, "Least exact tensors"))
    return Extraction(numbers, tables, out, errors)


def _files(plan: Plan, _: Path) -> Table:
    return files_table([file_identity(file, "sample") for file in sorted(plan.inputs.files())])


_TITLES = {
    "lora": "LoRA extracted from {}",
    "svd": "Low-rank pairs of {}",
    "mask": "Masks of {} over one vector",
    "bit": "1-bit deltas of {}",
}


def _write_card(spec: ExtractSpec, changes: Changes, folder: Path, result: Extraction, files: Table) -> None:
    errors = ", ".join(f"{task}: {error:.3g}" for task, error in result.numbers["relative_error"].items())
    write_card(
        folder,
        _TITLES[spec.kind].format(", ".join(changes.tasks)),
        f"Changes of `{changes.base.source}`. Relative error of all that changed, in the Frobenius norm: {errors}.",
        tags=["lora" if spec.kind == "lora" else f"{spec.kind}-delta"],
        base=[changes.base.source],
        spec=spec.model_dump(mode="json", by_alias=True, exclude_defaults=True),
        details="\n\n".join(table.to_markdown() for table in (result.tables[-1], files)),
        library="peft" if spec.kind == "lora" else "composition-toolkit",
    )
