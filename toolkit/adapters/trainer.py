"""transformers' Trainer, set up from a spec: its arguments, its callbacks, and what it tells at the end."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import EarlyStoppingCallback, PrinterCallback, Trainer, TrainerState, TrainingArguments

from toolkit.adapters import catalogue, processes, runs
from toolkit.adapters.callbacks import Allocation, MetricsFile, Rhythm, ShowProgress, tensorboard
from toolkit.adapters.dataset import Dataset
from toolkit.adapters.loader import Order, order_of
from toolkit.adapters.loop import AdapterTrainer
from toolkit.adapters.parts import Parts
from toolkit.adapters.spec import TrainSpec
from toolkit.adapters.trainee import computes_bfloat16
from toolkit.adapters.training._base import Course
from toolkit.data.collate import Collator
from toolkit.errors import Problem
from toolkit.models.load import LoadedModel, pick_device

_SPEEDS = ("runtime", "per_second", "preparation_time")
"""Ends of the names of what transformers adds to an evaluation."""

OURS = ("tensorboard", "plot")
"""Reports that are not made by transformers."""


@dataclass(frozen=True)
class Run:
    """Where a run is made.

    Attributes:
        folder: of its files.
        name: of what it makes.
        checkpoint: to go on from, if any.
        quiet: show no progress.
    """

    folder: Path
    name: str
    checkpoint: Path | None
    quiet: bool


def make_trainer(
    spec: TrainSpec, run: Run, loaded: LoadedModel, trained: Dataset, measured: Dataset | None, parts: Parts
) -> AdapterTrainer:
    """Set a trainer up.

    Raises:
        SpecError: the optimizer cannot be made.
    """
    method, t = catalogue.find(spec.adapter.method), spec.training
    batches = trained.stream or order_of(spec, trained.rows, in_sequence=parts.in_sequence)
    per_batch = len(trained.rows) / len(batches) if isinstance(batches, Order) else t.batch_size * processes.world()
    rows = per_batch * t.gradient_accumulation_steps
    trainer = AdapterTrainer(
        parts=parts,
        batches=batches,
        course=Course(t.max_steps or 0, rows, rows * trained.tokens, t.learning_rate),
        task_ids=method is not None and method.task_field is not None,
        # What some methods of PEFT add to the loss is no sum over tokens.
        mean_of_batch=method is not None and method.own_loss,
        model=loaded.model,
        args=training_arguments(spec, run.folder, evaluate=measured is not None),
        train_dataset=trained.stream or trained.rows,  # pyright: ignore[reportArgumentType]  # any sequence will do
        eval_dataset=measured.rows if measured else None,  # pyright: ignore[reportArgumentType]
        data_collator=collator(spec, loaded, parts),
        callbacks=_callbacks(spec, run, loaded),
    )
    trainer.remove_callback(PrinterCallback)
    for shown in (c for c in trainer.callback_handler.callbacks if isinstance(c, ShowProgress)):
        shown.tokens = lambda: trainer.tokens_seen * processes.world()
    for own in (callback for part in parts.methods for callback in part.callbacks(trainer)):
        trainer.add_callback(own)
    if t.gradient_checkpointing:
        loaded.model.gradient_checkpointing_enable({"use_reentrant": False})
    try:
        if not trainer.is_fsdp_enabled and not trainer.is_deepspeed_enabled:
            trainer.create_optimizer()
    except (ImportError, RuntimeError, TypeError, ValueError) as error:
        message = f"{t.optimizer} cannot be used here ({' '.join(str(error).split())})"
        raise spec.error([Problem("training.optimizer", message)]) from None
    return trainer


def _callbacks(spec: TrainSpec, run: Run, loaded: LoadedModel) -> list[Any]:
    found: list[Any] = [
        Rhythm(spec.training.save_steps),
        Allocation(loaded.model, "total_step" not in spec.adapter.fields),
    ]
    if spec.training.early_stopping_patience:
        found.insert(0, EarlyStoppingCallback(spec.training.early_stopping_patience))
    if not processes.is_first():
        return found
    if "tensorboard" in spec.training.report_to:
        found.insert(0, tensorboard(run.folder / "tensorboard"))
    return [MetricsFile(run.folder / runs.METRICS, run.checkpoint), ShowProgress(run.name, run.quiet), *found]


def collator(spec: TrainSpec, loaded: LoadedModel, parts: Parts | None = None) -> Any:
    """Return what makes batches: only packed rows need positions, without which attention computes faster."""
    method = catalogue.find(spec.adapter.method)
    collate = Collator(
        int(loaded.tokenizer.pad_token_id or 0),
        positions=spec.data.packing,
        tasks=(method is not None and method.task_field is not None) or (parts is not None and parts.needs_tasks),
    )
    return parts.objective.collate(collate) if parts else collate


def go(trainer: AdapterTrainer, checkpoint: Path | None) -> None:
    """Train to the end, from a checkpoint if there is one; one that is the end itself is restored."""
    if checkpoint is None or not runs.is_over(checkpoint):
        with ExitStack() as around:
            for method in trainer.parts.methods:
                around.enter_context(method.around(trainer))
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        return
    # The trainer would take one step more before it looks whether it should stop.
    trainer.state = TrainerState.load_from_json(str(checkpoint / runs.STATE))
    best = trainer.state.best_model_checkpoint
    trainer._load_from_checkpoint(str(checkpoint.parent / Path(best).name if best else checkpoint))


def train_loss(trainer: Trainer) -> float | None:
    """Return the mean loss over all steps, those before a checkpoint that training went on from included."""
    total, last = 0.0, 0
    for entry in trainer.state.log_history:
        if "loss" in entry:
            total += entry["loss"] * (entry["step"] - last)
            last = int(entry["step"])
    return total / last if last else None


def evaluated(trainer: Trainer) -> dict[str, float]:
    """Return what was measured on the model that the trainer ends with: the best one, or that of the last step."""
    state = trainer.state
    step = state.best_global_step if state.best_model_checkpoint is not None else state.global_step
    last = [e for e in state.log_history if "eval_loss" in e and e["step"] == step]
    found = last[-1] if last else trainer.evaluate()
    return {name: found[name] for name in found if name.startswith("eval_") and not name.endswith(_SPEEDS)}


def training_arguments(spec: TrainSpec, folder: Path, *, evaluate: bool) -> TrainingArguments:
    """Return a spec's settings in the words of transformers."""
    t = spec.training
    rhythm = {"eval_strategy": "steps" if t.eval_steps else "epoch", "eval_steps": t.eval_steps} if evaluate else {}
    if t.early_stopping_patience:
        # The best checkpoint can only be one that was evaluated; `Rhythm` adds those of save_steps.
        rhythm |= {"save_strategy": rhythm["eval_strategy"], "save_steps": t.eval_steps or 500}
        rhythm |= {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss"}
    elif t.save_steps:
        rhythm |= {"save_strategy": "steps", "save_steps": t.save_steps}
    else:
        rhythm |= {"save_strategy": "no"}
    return TrainingArguments(
        output_dir=str(folder / runs.CHECKPOINTS),
        num_train_epochs=t.num_epochs,
        max_steps=t.max_steps or -1,
        per_device_train_batch_size=t.batch_size,
        per_device_eval_batch_size=t.batch_size,
        gradient_accumulation_steps=t.gradient_accumulation_steps,
        learning_rate=t.learning_rate,
        lr_scheduler_type=t.lr_scheduler,
        warmup_steps=t.warmup_steps,
        weight_decay=t.weight_decay,
        max_grad_norm=t.max_grad_norm,
        optim=t.optimizer,
        bf16=computes_bfloat16(spec),
        fsdp=t.fsdp,  # pyright: ignore[reportArgumentType]  # true is the word for it by now
        fsdp_config=t.fsdp_config,
        deepspeed=t.deepspeed,
        # Of most methods all parameters have a part in every step, which need not be found out anew in each.
        ddp_find_unused_parameters=spec.adapter.method not in (catalogue.FULL, "lora"),
        seed=t.seed,
        logging_steps=t.logging_steps,
        save_total_limit=t.save_total_limit,
        use_cpu=pick_device(spec.device).type == "cpu",
        report_to=[name for name in t.report_to if name not in OURS],
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        label_names=["labels"],
        restore_callback_states_from_checkpoint=True,
        **rhythm,
    )
