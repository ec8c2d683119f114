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
from toolkit.adapters import plots, runs
from toolkit.adapters.catalogue import FULL
from toolkit.adapters.config import faults
from toolkit.adapters.dataset import train_set, validation_set
from toolkit.adapters.records import as_text, limits, write_records
from toolkit.adapters.spec import TrainSpec
from toolkit.checkpoints.writer import check_free, commit, locked, staging_path
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
    runs.finish(folder, keep_checkpoints=loaded.training.keep_checkpoints)
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
    if "plot" in spec.training.report_to:
        plots.save_loss_plot(partial / runs.METRICS, partial / plots.NAME)
    warning = limits(partial) if spec.adapter.method != FULL else None
    numbers |= {"warning": warning} if warning else {}
    return {**numbers, "seconds": round(time.perf_counter() - started, 2)}


def _train(spec: TrainSpec, loaded: LoadedModel, run: Run) -> dict[str, Any]:
    from toolkit.adapters.trainer import eval_loss, go, make_trainer, train_loss

    trained, measured = train_set(spec, loaded), validation_set(spec, loaded)
    trainer = make_trainer(spec, run, loaded, trained.rows, measured.rows if measured else None)
    go(trainer, run.checkpoint)
    parameters = list(loaded.model.parameters())
    return {
        "steps": trainer.state.global_step,
        "train_loss": train_loss(trainer),
        "eval_loss": eval_loss(trainer) if measured else None,
        "best_step": trainer.state.best_global_step,
        "trainable_parameters": sum(p.numel() for p in parameters if p.requires_grad),
        "parameters": sum(p.numel() for p in parameters),
        "data": trained.report,
    }


def _result(numbers: Mapping[str, Any], folder: Path) -> TrainResult:
    numbers = {**numbers, "path": str(folder)}
    rows = [[key.replace("_", " "), as_text(value)] for key, value in numbers.items() if not isinstance(value, dict)]
    return TrainResult(numbers, [Table(("train", folder.name), rows)], folder)
