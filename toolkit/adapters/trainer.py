"""transformers' Trainer, set up from a spec: its arguments, its callbacks, and what it tells at the end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import EarlyStoppingCallback, PrinterCallback, Trainer, TrainerState, TrainingArguments

from toolkit.adapters import catalogue, runs
from toolkit.adapters.callbacks import Allocation, MetricsFile, Rhythm, ShowProgress, tensorboard
from toolkit.adapters.loop import AdapterTrainer, Order
from toolkit.adapters.spec import TrainSpec
from toolkit.adapters.trainee import computes_bfloat16
from toolkit.data.collate import Collator
from toolkit.data.pack import Packed
from toolkit.errors import Problem
from toolkit.models.load import LoadedModel, pick_device

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
    spec: TrainSpec, run: Run, loaded: LoadedModel, train_rows: Sequence[Packed], eval_rows: Sequence[Packed] | None
) -> Trainer:
    """Set a trainer up.

    Raises:
        SpecError: the optimizer cannot be made.
    """
    callbacks: list[Any] = [MetricsFile(run.folder / runs.METRICS, run.checkpoint), ShowProgress(run.name, run.quiet)]
    if "tensorboard" in spec.training.report_to:
        callbacks.append(tensorboard(run.folder / "tensorboard"))
    if spec.training.early_stopping_patience:
        callbacks.append(EarlyStoppingCallback(spec.training.early_stopping_patience))
    fields = spec.adapter.fields
    callbacks += [Allocation(loaded.model, "total_step" not in fields), Rhythm(spec.training.save_steps)]
    method = catalogue.find(spec.adapter.method)
    order = Order(
        [len(row.tokens) for row in train_rows],
        spec.training.batch_size,
        seed=spec.training.seed,
        by_length=spec.data.batches == "by_length",
    )
    trainer = AdapterTrainer(
        order=order,
        model=loaded.model,
        args=_arguments(spec, run.folder, bool(eval_rows)),
        train_dataset=train_rows,  # pyright: ignore[reportArgumentType]  # any sequence will do
        eval_dataset=eval_rows,  # pyright: ignore[reportArgumentType]
        data_collator=collator(spec, loaded),
        callbacks=callbacks,
    )
    trainer.remove_callback(PrinterCallback)
    if method and method.own_loss:
        # A mean over the micro-batches of a step; what such a method adds to the loss is no sum over tokens.
        trainer.model_accepts_loss_kwargs = False
    if spec.training.gradient_checkpointing:
        loaded.model.gradient_checkpointing_enable({"use_reentrant": False})
    try:
        trainer.create_optimizer()
    except (ImportError, RuntimeError, TypeError, ValueError) as error:
        message = f"{spec.training.optimizer} cannot be used here ({' '.join(str(error).split())})"
        raise spec.error([Problem("training.optimizer", message)]) from None
    return trainer


def collator(spec: TrainSpec, loaded: LoadedModel) -> Collator:
    """Return what makes batches: PEFT numbers positions itself where it puts virtual tokens before a row."""
    method = catalogue.find(spec.adapter.method)
    return Collator(
        int(loaded.tokenizer.pad_token_id or 0),
        positions=method is None or not method.virtual_tokens,
        tasks=method is not None and method.task_field is not None,
    )


def go(trainer: Trainer, checkpoint: Path | None) -> None:
    """Train to the end, from a checkpoint if there is one; one that is the end itself is restored."""
    if checkpoint is None or not runs.is_over(checkpoint):
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


def eval_loss(trainer: Trainer) -> float:
    """Return the validation loss of the model that the trainer ends with: the best one's, or that of the last step."""
    if trainer.state.best_model_checkpoint is not None and trainer.state.best_metric is not None:
        return trainer.state.best_metric
    last = [e for e in trainer.state.log_history if "eval_loss" in e and e["step"] == trainer.state.global_step]
    return last[-1]["eval_loss"] if last else trainer.evaluate()["eval_loss"]


def _arguments(spec: TrainSpec, folder: Path, evaluate: bool) -> TrainingArguments:
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
