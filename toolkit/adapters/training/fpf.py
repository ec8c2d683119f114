"""Fine-tune only the parts that forget, on a few rows of every task (2304.04158, FPF and k-FPF).

Tasks are trained one after another. The parts of the model whose parameters change most from the end of one task to
the end of the next are the ones that are of one task each, and forget. At the end of the run (or `times` times in its
course) these alone are trained for a few steps on a buffer with rows of all tasks; all else stays.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn
from transformers import TrainerCallback

from toolkit.adapters import processes
from toolkit.adapters.dataset import tasks
from toolkit.adapters.spec import TrainSpec
from toolkit.adapters.training._base import TrainingMethod
from toolkit.errors import Problem

if TYPE_CHECKING:
    from transformers import TrainerControl, TrainerState, TrainingArguments

    from toolkit.adapters.loop import AdapterTrainer


class Fpf(TrainingMethod):
    """Forgetting-prone parts, fine-tuned on a buffer."""

    class Params(TrainingMethod.Params):
        """Parameters.

        Attributes:
            share: of the trained parameters that are fine-tuned, at most; always at least one tensor.
            buffer: rows of each task.
            times: how often in the run, at equal distances; the last time at its end. As many as the run has steps
                is after every step.
            replay_steps: steps on the buffer each time.
            learning_rate: of these steps; by default the run's own.
        """

        share: Annotated[float, Field(gt=0, le=1)] = 0.1
        buffer: Annotated[int, Field(ge=1)] = 32
        times: Annotated[int, Field(ge=1)] = 1
        replay_steps: Annotated[int, Field(ge=1)] = 10
        learning_rate: Annotated[float, Field(gt=0)] | None = None

    params: Params
    needs_tasks = True
    in_sequence = True

    def __init__(self, params: Params, spec: TrainSpec) -> None:
        super().__init__(params, spec)
        self.task: int | None = None
        self.end: dict[str, Tensor] = {}
        self.moved: dict[str, float] = {}
        self.chosen: list[str] = []

    def faults(self) -> Iterator[Problem]:
        """Refuse what has no sequence of tasks."""
        if len(tasks(self.spec)) < 2:
            yield Problem("data.train", "fpf compares the ends of several tasks; give sources of at least two")
        if self.spec.data.streaming:
            yield Problem("data.streaming", "fpf trains one task after another, which a stream mixes; set it to false")
        if processes.world() > 1:
            yield Problem(self.where, "fpf runs in one process")

    def begin_step(self, trainer: AdapterTrainer, batches: Sequence[Mapping[str, Any]]) -> None:
        """Where a new task begins, count how far the one before has moved every parameter."""
        task = int(batches[0]["task_ids"][0]) if batches else self.task
        if task != self.task:
            values = _values(trainer.unwrapped())
            self.moved = _added(self.moved, changes(self.end, values))
            self.end, self.task = values, task

    def callbacks(self, trainer: AdapterTrainer) -> list[TrainerCallback]:
        """Replay after the steps that are due."""
        return [_Replay(self, trainer)]

    def replay(self, trainer: AdapterTrainer, number: int) -> None:
        """Fine-tune the parts that moved most on the buffer.

        Args:
            trainer: of the run.
            number: of the replay, which decides on the order of the rows.
        """
        model = trainer.unwrapped()
        before = _values(model)
        self.chosen = select(_added(self.moved, changes(self.end, before)), model, self.params.share)
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        others = [p for name, p in trained.items() if name not in self.chosen]
        for p in others:
            p.requires_grad_(False)
        try:
            self._tune(trainer, model, [trained[name] for name in self.chosen], random.Random(f"{number}"))
        finally:
            for p in others:
                p.requires_grad_(True)
        for name in self.chosen:  # what a replay moves is of no task
            self.end[name] += trained[name].detach().cpu() - before[name]

    def _tune(self, trainer: AdapterTrainer, model: nn.Module, chosen: list[nn.Parameter], rng: random.Random) -> None:
        rate = self.params.learning_rate or trainer.course.learning_rate
        optimizer = torch.optim.AdamW(chosen, lr=rate, weight_decay=0.0)
        rows: Any = trainer.train_dataset
        buffer = _buffer(rows, self.params.buffer, trainer.args.seed)
        size = min(trainer.args.per_device_train_batch_size, len(buffer))
        for _ in range(self.params.replay_steps):
            inputs = trainer.for_model(trainer._prepare_inputs(trainer.data_collator(rng.sample(buffer, size))))
            with trainer.compute_loss_context_manager():
                loss = trainer.parts.objective.loss(trainer, model, inputs, trainer.parts.objective.count(inputs))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    def state(self) -> dict[str, Any]:
        """Return the weights at the end of the last task, and how far each parameter has moved."""
        return {"task": self.task, "end": self.end, "moved": self.moved}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from these."""
        self.task, self.end, self.moved = state["task"], state["end"], state["moved"]

    def record(self) -> dict[str, Any]:
        """Return which parameters were fine-tuned last."""
        return {"fine_tuned": self.chosen}


class _Replay(TrainerCallback):
    def __init__(self, method: Fpf, trainer: AdapterTrainer) -> None:
        self.method, self.trainer = method, trainer

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Replay where one is due."""
        times = min(self.method.params.times, state.max_steps)
        due = state.global_step * times // state.max_steps
        if due > (state.global_step - 1) * times // state.max_steps:
            self.method.replay(self.trainer, due)


def changes(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> dict[str, float]:
    """Return how far each parameter has moved, the mean over its entries, from one end of a task to the next."""
    return {name: float((after[name] - value).abs().mean()) for name, value in before.items()}


def _added(a: Mapping[str, float], b: Mapping[str, float]) -> dict[str, float]:
    return {name: a.get(name, 0.0) + b.get(name, 0.0) for name in (a or b)}


def select(moved: Mapping[str, float], model: nn.Module, share: float) -> list[str]:
    """Name the parameters that moved most, up to a share of all entries, and at least one."""
    sizes = {name: p.numel() for name, p in model.named_parameters() if name in moved}
    budget, chosen = share * sum(sizes.values()), []
    for name in sorted(moved, key=lambda name: (-moved[name], name)):
        if chosen and sizes[name] > budget:
            continue
        chosen.append(name)
        budget -= sizes[name]
    return chosen


def _values(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().cpu().clone() for name, p in model.named_parameters() if p.requires_grad}


def _buffer(rows: Sequence[Any], count: int, seed: int) -> list[Any]:
    """Choose rows of every task."""
    rng = random.Random(f"{seed} buffer")
    found = []
    for task in sorted({row.task for row in rows}):
        own = [row for row in rows if row.task == task]
        found += rng.sample(own, min(count, len(own)))
    return found
