"""Train an adapter, or a whole model: transformers' Trainer and PEFT underneath, data and outputs ours.

Work goes on in a hidden sibling of the output folder, with its checkpoints, so that a killed run can be resumed
and the output appears only when it is whole.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolkit import specs
from toolkit.adapters import runs
from toolkit.adapters.config import faults
from toolkit.adapters.records import as_text, limits, write_records
from toolkit.adapters.spec import TrainSpec
from toolkit.checkpoints.writer import check_free, commit, locked, staging_path
from toolkit.data.pack import Packed, alone, pack
from toolkit.data.render import Renderer, RenderReport
from toolkit.data.rows import read_rows
from toolkit.errors import Problem
from toolkit.models.load import LoadedModel, quiet_transformers
from toolkit.tables import Report, Table

if TYPE_CHECKING:
    from toolkit.adapters.trainer import Run


@dataclass(frozen=True)
class TrainResult(Report):
    """A finished training run.

    Attributes:
        path: folder of the adapter, or of the model.
    """

    path: Path = Path()


@dataclass(frozen=True)
class _Dataset:
    rows: list[Packed]
    report: RenderReport


def train(
    spec: specs.Source | TrainSpec,
    out: str | Path | None = None,
    *,
    overrides: Sequence[str] = (),
    smoke: bool = False,
    resume: bool = False,
    overwrite: bool = False,
    quiet: bool = False,
) -> TrainResult:
    """Train what a spec describes.

    Args:
        spec: a YAML file, a dict or a `TrainSpec`.
        out: folder to write, instead of the spec's own.
        overrides: `key.path=value` changes to the spec.
        smoke: apply the spec's own `smoke:` block.
        resume: go on with a run into `out` that was stopped, from its last whole checkpoint.
        overwrite: replace `out` if it exists.
        quiet: show no progress.

    Raises:
        SpecError: the spec is wrong.
        MissingError: no such data file, or no such base.
        DataError: a row that cannot be used, before the first step.
        OutputError: `out` exists, or there is nothing to resume.
    """
    loaded = specs.load(spec, TrainSpec, overrides=overrides, smoke=smoke)
    found = faults(loaded)
    if not (out or loaded.out):
        found.append(Problem("out", "required: the folder to write"))
    if found:
        raise loaded.error(found)
    folder = Path(os.path.expanduser(out or loaded.out or ""))
    check_free(folder, overwrite=overwrite)
    data = runs.hash_data(loaded)
    with locked(staging_path(folder)) as partial:
        checkpoint = runs.last_checkpoint(partial, loaded, data) if resume else None
        if checkpoint is None:
            runs.begin(partial, loaded, data)
        try:
            with quiet_transformers():
                numbers = _run(loaded, partial, folder.name, checkpoint, quiet)
            write_records(loaded, partial, folder.name, numbers, data)
            commit(partial, folder)
        finally:
            if partial.exists() and not runs.checkpoints(partial):
                shutil.rmtree(partial)  # nothing in it that could be resumed
    runs.finish(folder)
    return _result(numbers, folder)


def _run(spec: TrainSpec, partial: Path, name: str, checkpoint: Path | None, quiet: bool) -> dict[str, Any]:
    from toolkit.adapters.packing import check_packing
    from toolkit.adapters.trainee import save, trainee
    from toolkit.adapters.trainer import Run

    started = time.perf_counter()
    with trainee(spec) as loaded:
        if spec.data.packing:
            check_packing(spec, loaded)
        numbers = _train(spec, loaded, Run(partial, name, checkpoint, quiet))
        save(spec, loaded, partial)
    warning = limits(partial) if spec.adapter.method != "full" else None
    numbers |= {"warning": warning} if warning else {}
    return {**numbers, "seconds": round(time.perf_counter() - started, 2)}


def _train(spec: TrainSpec, loaded: LoadedModel, run: Run) -> dict[str, Any]:
    from toolkit.adapters.trainer import eval_loss, go, make_trainer, train_loss

    train_set = _dataset(spec, spec.data.train, loaded)
    eval_set = _dataset(spec, spec.data.validation, loaded) if spec.data.validation else None
    trainer = make_trainer(spec, run, loaded, train_set.rows, eval_set.rows if eval_set else None)
    go(trainer, run.checkpoint)
    parameters = list(loaded.model.parameters())
    return {
        "steps": trainer.state.global_step,
        "train_loss": train_loss(trainer),
        "eval_loss": eval_loss(trainer) if eval_set else None,
        "best_step": trainer.state.best_global_step,
        "trainable_parameters": sum(p.numel() for p in parameters if p.requires_grad),
        "parameters": sum(p.numel() for p in parameters),
        "data": train_set.report.to_dict(),
    }


def _dataset(spec: TrainSpec, files: Sequence[str], loaded: LoadedModel) -> _Dataset:
    data, tokenizer = spec.data, loaded.tokenizer
    context = _context(loaded)
    longest = data.max_length or min(context or 1024, tokenizer.model_max_length)
    options = {"train_on_inputs": data.train_on_inputs, "context": context}
    renderer = Renderer(tokenizer, longest, data.too_long, data.empty, **options)
    examples, report = renderer.render_all(read_rows(files))
    # Positions start anew in every document, so a packed row may be longer than the model's context.
    return _Dataset(pack(examples, longest) if data.packing else [alone(e) for e in examples], report)


def _context(loaded: LoadedModel) -> int | None:
    """Return the most tokens that the positions of a model reach, where its config says so."""
    config = loaded.model.config.get_text_config()
    return getattr(config, "max_position_embeddings", None) or getattr(config, "max_seq_len", None)


def _result(numbers: Mapping[str, Any], folder: Path) -> TrainResult:
    numbers = {**numbers, "path": str(folder)}
    rows = [[key.replace("_", " "), as_text(value)] for key, value in numbers.items() if not isinstance(value, dict)]
    return TrainResult(numbers, [Table(("train", folder.name), rows)], folder)
