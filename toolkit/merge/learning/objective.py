"""The loss of a task on some rows, by the name that a spec gives it; and the share of right predictions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from toolkit.checkpoints.writer import check_space
from toolkit.errors import OutputError
from toolkit.merge.learning import losses
from toolkit.merge.learning.session import Session
from toolkit.merge.learning.spec import CoefficientParams
from toolkit.merge.learning.tasks import Task
from toolkit.progress import track

BATCH = 32
"""Rows of a forward pass where nothing is learned."""


def task_loss(session: Session, task: Task, rows: Sequence[int]) -> Tensor:
    """Return a task's weighted loss on some of its rows, with the model as it stands."""
    params, model = session.params, session.engine.model
    assert isinstance(params, CoefficientParams)
    if params.loss == "entropy":
        loss = losses.entropy(task.logits(model, rows))
    elif params.loss == "cross_entropy":
        loss = losses.cross_entropy(task.logits(model, rows), task.targets(rows).to(model.device))
    elif params.loss == "contrastive":
        loss = losses.contrastive(*task.pairs(model, rows), params.temperature)
    else:
        teacher = torch.from_numpy(_teacher(session, task, rows)).to(model.device)
        loss = losses.distillation(task.logits(model, rows), teacher, params.temperature)
    return loss * task.spec.weight


def accuracy(session: Session, task: Task, batch_size: int = BATCH) -> float:
    """Return the percent of right predictions of a task, with the model as it stands."""
    right = count = 0
    with torch.inference_mode():
        for first in range(0, task.size, batch_size):
            rows = range(first, min(first + batch_size, task.size))
            found = task.logits(session.engine.model, rows).argmax(-1).cpu() == task.targets(rows)
            right, count = right + int(found.sum()), count + len(found)
    return 100 * right / count


def teach(session: Session) -> None:
    """Write down what each task's own model predicts of its rows, for distillation.

    One model is in memory; the predictions are float32 files beside the unfinished result.
    """
    engine = session.engine
    for task in session.tasks:
        file = _file(session, task)
        if file.is_file():
            continue
        engine.expert(session.vectors.names.index(task.name))
        partial = file.with_suffix(".partial.npy")
        total = sum(task.predictions(row) for row in range(task.size))
        out: np.ndarray | None = None
        done = 0
        label = f"predictions of {task.name}"
        with track(label, task.size, unit="rows", quiet=session.quiet) as progress, torch.inference_mode():
            for first in range(0, task.size, BATCH):
                rows = range(first, min(first + BATCH, task.size))
                logits = task.logits(engine.model, rows).float().cpu().numpy()
                if out is None:
                    check_space(session.folder, 4 * total * logits.shape[1])
                    out = np.lib.format.open_memmap(partial, "w+", np.float32, (total, logits.shape[1]))
                out[done : done + len(logits)] = logits
                done += len(logits)
                progress.advance(len(rows))
        del out
        try:
            partial.replace(file)
        except OSError as error:
            raise OutputError(f"{file}: {error.strerror}") from None


def forget(session: Session) -> None:
    """Remove what `teach` wrote."""
    for task in session.tasks:
        _file(session, task).unlink(missing_ok=True)


def _teacher(session: Session, task: Task, rows: Sequence[int]) -> np.ndarray:
    stored = np.load(_file(session, task), mmap_mode="r")
    starts = np.cumsum([0, *(task.predictions(row) for row in range(task.size))])
    return np.concatenate([stored[starts[row] : starts[row + 1]] for row in rows])


def _file(session: Session, task: Task) -> Path:
    return session.folder / f"teacher-{[t.name for t in session.tasks].index(task.name)}.npy"


def mean_loss(session: Session, values: np.ndarray) -> float:
    """Return the sum over tasks of the mean loss on all of their rows, at coefficients `[M, G]`.

    Tasks are run in batches of `BATCH` rows, each of which counts by its rows.
    """
    total = 0.0
    for task in session.tasks:
        for first in range(0, task.size, BATCH):
            rows = range(first, min(first + BATCH, task.size))
            share = len(rows) / task.size
            total += share * session.engine.loss(values, [lambda t=task, r=rows: task_loss(session, t, r)])
    return total
