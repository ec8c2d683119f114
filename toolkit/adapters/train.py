"""Train an adapter, or a whole model: transformers' Trainer and PEFT underneath, data and outputs ours.

`accelerate launch -m toolkit train SPEC` does so in several processes, of which the first writes. Work goes on in a
hidden sibling of the output folder, with its checkpoints, so that a killed run can be resumed and the output appears
only when it is whole.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolkit import specs
from toolkit.adapters import outputs, plots, processes, runs
from toolkit.adapters.catalogue import FULL
from toolkit.adapters.config import faults
from toolkit.adapters.dataset import train_set, validation_set
from toolkit.adapters.records import as_text, limits, write_records
from toolkit.adapters.spec import TrainSpec
from toolkit.checkpoints.writer import check_free, commit, locked, staging_path
from toolkit.errors import Problem
from toolkit.models.load import LoadedModel, pick_device, quiet_transformers
from toolkit.tables import Report, Table

if TYPE_CHECKING:
    import torch

    from toolkit.adapters.parts import Parts
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
        OutputError: `out` or another output exists, or there is nothing to resume.
        UnsupportedError: what is to be made of the adapter afterwards cannot be made of this one.
    """
    loaded = specs.load(spec, TrainSpec, overrides=overrides, smoke=smoke)
    found = faults(loaded)
    if not (out or loaded.out):
        found.append(Problem("out", "required: the folder to write"))
    if found:
        raise loaded.error(found)
    folder = Path(os.path.expanduser(out or loaded.out or ""))
    outputs.check(loaded, folder)
    device = pick_device(loaded.device)
    with _folder(loaded, folder, device, resume=resume, overwrite=overwrite) as (partial, checkpoint, data):
        with quiet_transformers():
            numbers = _run(loaded, partial, folder.name, checkpoint, quiet or not processes.is_first())
        processes.wait(device)
        if processes.is_first():
            write_records(loaded, partial, folder.name, numbers, data)
            commit(partial, folder)
            runs.finish(folder, keep_checkpoints=loaded.training.keep_checkpoints)
            numbers |= outputs.write(loaded, folder)
        processes.wait(device)
    return result(numbers, folder)


@contextmanager
def _folder(
    spec: TrainSpec, folder: Path, device: torch.device, *, resume: bool, overwrite: bool
) -> Iterator[tuple[Path, Path | None, dict[str, str]]]:
    """Yield the folder of the run under way, the checkpoint to go on from, and hashes of the data.

    The first process makes and holds it; the others wait until it is there.
    """
    partial, data = staging_path(folder), runs.hash_data(spec)
    if not processes.is_first():
        processes.wait(device)
        yield partial, runs.last_checkpoint(partial, spec, data) if resume else None, data
        return
    check_free(folder, overwrite=overwrite)
    with locked(partial):
        checkpoint = runs.last_checkpoint(partial, spec, data) if resume else None
        if checkpoint is None:
            runs.begin(partial, spec, data)
        processes.wait(device)
        try:
            yield partial, checkpoint, data
        finally:
            if partial.exists() and not runs.checkpoints(partial):
                shutil.rmtree(partial)  # nothing in it that could be resumed


def _run(spec: TrainSpec, partial: Path, name: str, checkpoint: Path | None, quiet: bool) -> dict[str, Any]:
    from toolkit.adapters.packing import check_packing
    from toolkit.adapters.parts import parts_of
    from toolkit.adapters.trainee import trainee
    from toolkit.adapters.trainer import Run

    started = time.perf_counter()
    parts = parts_of(spec)
    parts.objective.survey()
    with trainee(spec, parts) as loaded:
        if spec.data.packing:
            check_packing(spec, loaded)
        outputs.check_model(spec, loaded)
        numbers = _train(spec, loaded, Run(partial, name, checkpoint, quiet), parts)
    if processes.is_first():
        if "plot" in spec.training.report_to:
            plots.save_loss_plot(partial / runs.METRICS, partial / plots.NAME)
        warning = limits(partial) if spec.adapter.method != FULL else None
        numbers |= {"warning": warning} if warning else {}
    return {**numbers, **parts.record(), "seconds": round(time.perf_counter() - started, 2)}


def _train(spec: TrainSpec, loaded: LoadedModel, run: Run, parts: Parts) -> dict[str, Any]:
    from toolkit.adapters.trainee import name_base, save
    from toolkit.adapters.trainer import evaluated, go, make_trainer, train_loss

    trained, measured = train_set(spec, loaded, parts, run.folder), validation_set(spec, loaded, parts)
    trainer = make_trainer(spec, run, loaded, trained, measured, parts)
    go(trainer, run.checkpoint)
    parameters = list(loaded.model.parameters())
    numbers = {
        "steps": trainer.state.global_step,
        "train_loss": train_loss(trainer),
        **(evaluated(trainer) if measured else {"eval_loss": None}),
        "best_step": trainer.state.best_global_step,
        "trainable_parameters": sum(p.numel() for p in parameters if p.requires_grad),
        "parameters": sum(p.numel() for p in parameters),
        "data": trained.report,
    }
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        name_base(loaded)
        trainer.save_model(str(run.folder))  # no process holds all of the model
        if processes.is_first() and spec.adapter.method == FULL:
            loaded.tokenizer.save_pretrained(run.folder)
    elif processes.is_first():
        save(spec, loaded, run.folder)
    return numbers


def result(numbers: Mapping[str, Any], folder: Path) -> TrainResult:
    """Return what a run reports."""
    numbers = {**numbers, "path": str(folder)}
    rows = [[key.replace("_", " "), as_text(value)] for key, value in numbers.items() if not isinstance(value, dict)]
    return TrainResult(numbers, [Table(("train", folder.name), rows)], folder)
