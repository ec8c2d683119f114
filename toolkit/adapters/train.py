"""Train an adapter, or a whole model: transformers' Trainer and PEFT underneath, data and outputs ours.

Work goes on in a hidden sibling of the output folder, with its checkpoints, so that a killed run can be resumed
and the output appears only when it is whole.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolkit import specs
from toolkit.adapters import runs
from toolkit.adapters.spec import TrainSpec
from toolkit.checkpoints.companions import file_hashes, versions, write_card
from toolkit.checkpoints.writer import check_free, commit, locked, staging_path, write_text
from toolkit.data.collate import Collator
from toolkit.data.pack import Packed, alone, pack
from toolkit.data.render import Renderer, RenderReport
from toolkit.data.rows import read_rows
from toolkit.errors import Problem
from toolkit.models.load import LoadedModel, pick_device, quiet_transformers
from toolkit.tables import Report, Table, human_count

if TYPE_CHECKING:
    from transformers import Trainer, TrainingArguments

METRICS = "metrics.jsonl"


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
        DataError: a row that cannot be used, before the first step.
        OutputError: `out` exists, or there is nothing to resume.
    """
    loaded = specs.load(spec, TrainSpec, overrides=overrides, smoke=smoke)
    folder = Path(out or loaded.out or "")
    if folder == Path():
        raise loaded.error([Problem("out", "required: the folder to write")])
    check_free(folder, overwrite=overwrite)
    with locked(staging_path(folder)) as partial:
        checkpoint = runs.last_checkpoint(partial, loaded) if resume else None
        if checkpoint is None:
            runs.begin(partial, loaded)
        try:
            with quiet_transformers():
                numbers = _run(loaded, partial, folder.name, checkpoint, quiet)
            commit(partial, folder)
        finally:
            if partial.exists() and not runs.checkpoints(partial):
                shutil.rmtree(partial)  # nothing in it that could be resumed
    numbers["path"] = str(folder)
    rows = [[key.replace("_", " "), _text(value)] for key, value in numbers.items() if not isinstance(value, dict)]
    return TrainResult(numbers, [Table(("train", folder.name), rows)], folder)


def _run(spec: TrainSpec, partial: Path, name: str, checkpoint: Path | None, quiet: bool) -> dict[str, Any]:
    from toolkit.adapters.trainee import save, trainee

    started = time.perf_counter()
    with trainee(spec) as loaded:
        train_set = _dataset(spec, spec.data.train, loaded)
        eval_set = _dataset(spec, spec.data.validation, loaded) if spec.data.validation else None
        trainer = _trainer(spec, partial, name, loaded, train_set, eval_set, checkpoint, quiet)
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        history = _history(trainer)
        if eval_set and "eval_loss" not in history:
            history["eval_loss"] = trainer.evaluate()["eval_loss"]
        parameters = list(loaded.model.parameters())
        numbers: dict[str, Any] = {
            "steps": trainer.state.global_step,
            "train_loss": history.get("train_loss"),
            "eval_loss": history.get("eval_loss"),
            "best_step": trainer.state.best_global_step,
            "trainable_parameters": sum(p.numel() for p in parameters if p.requires_grad),
            "parameters": sum(p.numel() for p in parameters),
            "seconds": round(time.perf_counter() - started, 2),
            "data": train_set.report.to_dict(),
        }
        save(spec, loaded, partial)
    runs.finish(partial)
    _write_records(spec, partial, name, numbers)
    return numbers


def _dataset(spec: TrainSpec, files: Sequence[str], loaded: LoadedModel) -> _Dataset:
    data, config = spec.data, loaded.model.config
    longest = data.max_length or min(
        getattr(config, "max_position_embeddings", None) or 1024, loaded.tokenizer.model_max_length
    )
    renderer = Renderer(loaded.tokenizer, longest, data.too_long, data.empty, train_on_inputs=data.train_on_inputs)
    examples, report = renderer.render_all(read_rows(files))
    return _Dataset(pack(examples, longest) if data.packing else [alone(e) for e in examples], report)


def _trainer(
    spec: TrainSpec,
    partial: Path,
    name: str,
    loaded: LoadedModel,
    train_set: _Dataset,
    eval_set: _Dataset | None,
    checkpoint: Path | None,
    quiet: bool,
) -> Trainer:
    from transformers import EarlyStoppingCallback, PrinterCallback, Trainer

    from toolkit.adapters.callbacks import MetricsFile, ShowProgress, tensorboard

    callbacks: list[Any] = [MetricsFile(partial / METRICS, checkpoint), ShowProgress(name, quiet)]
    if "tensorboard" in spec.training.report_to:
        callbacks.append(tensorboard(partial / "tensorboard"))
    if spec.training.early_stopping_patience:
        callbacks.append(EarlyStoppingCallback(spec.training.early_stopping_patience))
    trainer = Trainer(
        model=loaded.model,
        args=_arguments(spec, partial, bool(eval_set)),
        train_dataset=train_set.rows,  # pyright: ignore[reportArgumentType]  # any sequence will do
        eval_dataset=eval_set.rows if eval_set else None,  # pyright: ignore[reportArgumentType]
        data_collator=Collator(int(loaded.tokenizer.pad_token_id or 0)),
        callbacks=callbacks,
    )
    trainer.remove_callback(PrinterCallback)
    if spec.training.gradient_checkpointing:
        loaded.model.gradient_checkpointing_enable({"use_reentrant": False})
    return trainer


def _arguments(spec: TrainSpec, partial: Path, evaluate: bool) -> TrainingArguments:
    from transformers import TrainingArguments

    from toolkit.adapters.trainee import computes_bfloat16

    t = spec.training
    rhythm = {"eval_strategy": "steps" if t.eval_steps else "epoch", "eval_steps": t.eval_steps} if evaluate else {}
    if t.early_stopping_patience:
        # The best checkpoint can only be one that was evaluated.
        rhythm |= {"save_strategy": rhythm["eval_strategy"], "save_steps": t.eval_steps or 500}
        rhythm |= {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss"}
    elif t.save_steps:
        rhythm |= {"save_strategy": "steps", "save_steps": t.save_steps}
    else:
        rhythm |= {"save_strategy": "no"}
    return TrainingArguments(
        output_dir=str(partial / runs.CHECKPOINTS),
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
        report_to=[name for name in t.report_to if name != "tensorboard"],
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        label_names=["labels"],
        **rhythm,
    )


def _history(trainer: Trainer) -> dict[str, float]:
    """Return the last value of each loss that was logged."""
    found: dict[str, float] = {}
    for entry in trainer.state.log_history:
        found |= {key: value for key, value in entry.items() if key in ("loss", "eval_loss", "train_loss")}
    return found


def _write_records(spec: TrainSpec, partial: Path, name: str, numbers: dict[str, Any]) -> None:
    described = spec.model_dump(mode="json")
    used = versions("torch", "transformers", "peft", "accelerate")
    hashes = file_hashes([*map(Path, spec.data.train), *partial.glob("*.safetensors")])
    record = {"spec": described, "versions": used, "sha256": hashes, **numbers}
    write_text(partial / "training.json", json.dumps(record, indent=2) + "\n")
    full = spec.adapter.method == "full"
    what = "every weight" if full else f"{spec.adapter.method} {json.dumps(spec.adapter.fields)}"
    write_card(
        partial,
        name,
        f"Trained {what} on {', '.join(f'`{f}`' for f in spec.data.train)} for {numbers['steps']} steps;"
        f" mean training loss {_text(numbers['train_loss'])}.",
        tags=[spec.adapter.method],
        base=[str(described["base"])],
        spec=spec.model_dump(mode="json", exclude_defaults=True),
        details=Table(("file", "sha256"), list(map(list, hashes.items()))).to_markdown(),
        library="transformers" if full else "peft",
    )


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if value is None:
        return "-"
    return human_count(value) if isinstance(value, int) and value >= 10000 else str(value)
