"""Train several LoRAs of one base in the same batches, each as if it were alone.

The frozen base computes once for the rows of all; each LoRA adds its change to its own rows only, and has its own data,
loss, optimizer and learning rate. So every adapter takes the steps of its own run, to float rounding.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import islice
from math import ceil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, get_scheduler

from toolkit import specs
from toolkit.adapters import runs
from toolkit.adapters.config import faults
from toolkit.adapters.dataset import Dataset, train_set, validation_set
from toolkit.adapters.loader import Order, order_of
from toolkit.adapters.packing import check_packing
from toolkit.adapters.parts import Parts, parts_of
from toolkit.adapters.records import write_records
from toolkit.adapters.shared_batches import Pair, frozen, shared_losses
from toolkit.adapters.spec import TrainSpec
from toolkit.adapters.train import TrainResult, result
from toolkit.adapters.trainee import computes_bfloat16, save, trainee
from toolkit.adapters.trainer import Run, collator, evaluated, make_trainer, training_arguments
from toolkit.checkpoints.writer import check_free, staged, write_text
from toolkit.data.groups import Item
from toolkit.data.render import IGNORED
from toolkit.errors import Problem
from toolkit.models.load import LoadedModel, load_model, pick_device, quiet_transformers
from toolkit.progress import track

_SAME = ("base", "device", "trust_remote_code")
"""What all runs have in common."""

_VARIANTS = (
    "use_dora",
    "lora_bias",
    "modules_to_save",
    "target_parameters",
    "trainable_token_indices",
    "alora_invocation_tokens",
    "use_qalora",
    "layer_replication",
    "megatron_config",
    "arrow_config",
    "kasa_config",
    "velora_config",
    "use_bdlora",
    "monteclora_config",
)
"""Fields of a LoRA that make it another computation than `x A^T B^T` times a scale."""


@dataclass
class _Job:
    """One adapter and its run."""

    spec: TrainSpec
    parts: Parts
    folder: Path
    pairs: dict[str, Pair]
    trained: Dataset
    steps: int
    optimizer: Any
    schedule: Any
    batches: Iterator[list[list[Item]]]
    losses: list[float] = field(default_factory=list)
    entries: list[dict[str, float]] = field(default_factory=list)

    @property
    def name(self) -> str:
        """Name of what it makes."""
        return Path(self.spec.out or "").name

    @property
    def parameters(self) -> list[nn.Parameter]:
        """Every factor that is trained."""
        return [factor for pair in self.pairs.values() for factor in (pair.a, pair.b)]


def train_together(
    sources: Sequence[specs.Source | TrainSpec],
    *,
    overrides: Sequence[str] = (),
    smoke: bool = False,
    overwrite: bool = False,
    quiet: bool = False,
) -> list[TrainResult]:
    """Train the LoRAs of several specs in the same batches.

    Args:
        sources: YAML files, dicts or specs, of the same base; each names its own `out`.
        overrides: `key.path=value` changes to every spec.
        smoke: apply each spec's own `smoke:` block.
        overwrite: replace outputs that exist.
        quiet: show no progress.

    Raises:
        SpecError: a spec is wrong, or asks for what cannot be done beside others.
        MissingError, DataError, OutputError: as `train`.
    """
    loaded = [specs.load(source, TrainSpec, overrides=overrides, smoke=smoke) for source in sources]
    for spec in loaded:
        found = [*faults(spec), *_faults(spec, loaded)]
        if found:
            raise spec.error(found)
        check_free(Path(spec.out or ""), overwrite=overwrite)
    first = loaded[0]
    device = pick_device(first.device)
    dtype = torch.bfloat16 if computes_bfloat16(first) else torch.float32
    base = load_model(first.base, device=device, dtype=dtype, trust_remote_code=first.trust_remote_code)
    with quiet_transformers(), ExitStack() as folders:
        jobs = []
        for spec in loaded:
            folder = folders.enter_context(staged(Path(spec.out or ""), overwrite=overwrite))
            jobs.append(_job(spec, base, folder))
        _train(jobs, base, quiet)
        numbers = [_finish(job, base) for job in jobs]
    return [result(n, Path(spec.out or "")) for n, spec in zip(numbers, loaded, strict=True)]


def _faults(spec: TrainSpec, others: Sequence[TrainSpec]) -> Iterator[Problem]:
    """Say what of a run cannot be done beside others."""
    for key in _SAME:
        if getattr(spec, key) != getattr(others[0], key):
            yield Problem(key, f"adapters that train together share it; {others[0].out} has {getattr(others[0], key)}")
    if computes_bfloat16(spec) != computes_bfloat16(others[0]):
        yield Problem("training.precision", f"adapters that train together share it; {others[0].out} has another")
    if spec.out is None or [other.out for other in others].count(spec.out) > 1:
        yield Problem("out", "required, and different for every adapter")
    variants = [key for key in _VARIANTS if spec.adapter.fields.get(key)]
    if spec.adapter.method != "lora" or variants:
        what = variants[0] if variants else spec.adapter.method
        yield Problem("adapter", f"plain LoRAs train together; {what} does not")
    if spec.adapter.fields.get("lora_dropout"):
        yield Problem("adapter.lora_dropout", "would draw other numbers than in a run of its own; set it to 0")
    t = spec.training
    for key, given in (
        ("save_steps", t.save_steps),
        ("early_stopping_patience", t.early_stopping_patience),
        ("methods", t.methods),
        ("gradient_checkpointing", t.gradient_checkpointing),
    ):
        if given:
            yield Problem(f"training.{key}", "is for runs of one adapter; leave it out")
    if spec.objective.method != "completion" or spec.data.streaming or spec.quantization or spec.initialize == "random":
        yield Problem("", "adapters that train together learn completions from rows in memory, on a plain base")


def _job(spec: TrainSpec, base: LoadedModel, folder: Path) -> _Job:
    """Set a run up: its adapter starts as in a run of its own."""
    parts, t = parts_of(spec), spec.training
    with trainee(_on(spec, base), parts) as loaded:
        layers = _lora_layers(loaded)
        pairs = {
            name: Pair(
                nn.Parameter(layer.lora_A["default"].weight.detach().clone()),
                nn.Parameter(layer.lora_B["default"].weight.detach().clone()),
                layer.scaling["default"],
            )
            for name, layer in layers.items()
        }
        if spec.data.packing:
            check_packing(spec, loaded)
        trained = train_set(spec, loaded, parts, folder)
    arguments = training_arguments(spec, folder, evaluate=False)
    order = order_of(spec, trained.rows)
    per_epoch = ceil(len(order) / t.gradient_accumulation_steps)
    steps = t.max_steps or ceil(t.num_epochs * per_epoch)
    made, options = Trainer.get_optimizer_cls_and_kwargs(arguments)
    factors = [factor for pair in pairs.values() for factor in (pair.a, pair.b)]
    optimizer = made([{"params": factors, "weight_decay": t.weight_decay}], **options)
    schedule = get_scheduler(t.lr_scheduler, optimizer, arguments.get_warmup_steps(steps), steps)
    batches = _batches(trained, order, t.gradient_accumulation_steps)
    return _Job(spec, parts, folder, pairs, trained, steps, optimizer, schedule, batches)


def _lora_layers(loaded: LoadedModel) -> dict[str, Any]:
    model: Any = loaded.model
    return {n: m for n, m in model.get_base_model().named_modules() if "default" in getattr(m, "lora_A", ())}


def _on(spec: TrainSpec, base: LoadedModel) -> TrainSpec:
    return spec.model_copy(update={"base": base})


def _batches(trained: Dataset, order: Order, accumulated: int) -> Iterator[list[list[Item]]]:
    """Yield the micro-batches of one step after another, epoch by epoch, without end."""
    epoch = 0
    while True:
        order.set_epoch(epoch)
        indices = iter(order)
        while group := list(islice(indices, accumulated)):
            yield [[trained.rows[i] for i in batch] for batch in group]
        epoch += 1


def _train(jobs: Sequence[_Job], base: LoadedModel, quiet: bool) -> None:
    total = max(job.steps for job in jobs)
    with frozen(base.model), track("training together", total, unit="steps", quiet=quiet) as progress:
        for step in range(total):
            active = [job for job in jobs if step < job.steps]
            _step(active, base, step)
            progress.note("  ".join(f"{job.name} {job.losses[-1]:.4f}" for job in active if job.losses))
            progress.advance()


def _step(jobs: Sequence[_Job], base: LoadedModel, step: int) -> None:
    """Take one step of every job."""
    groups = [next(job.batches) for job in jobs]
    counts = [sum(_count(row) for batch in group for row in batch) for group in groups]
    losses = [0.0] * len(jobs)
    for number in range(max(map(len, groups))):
        taking = [i for i, group in enumerate(groups) if number < len(group)]
        parts = _losses([jobs[i] for i in taking], [groups[i][number] for i in taking], base)
        scaled = [part / counts[i] for i, part in zip(taking, parts, strict=True)]
        torch.stack(scaled).sum().backward()
        for i, value in zip(taking, scaled, strict=True):
            losses[i] += float(value.detach())
    for job, loss in zip(jobs, losses, strict=True):
        _update(job, loss, step + 1)


def _count(row: Item) -> int:
    return sum(label != IGNORED for label in row.labels[1:])  # pyright: ignore[reportAttributeAccessIssue]


def _losses(jobs: Sequence[_Job], batches: Sequence[list[Item]], base: LoadedModel) -> list[Tensor]:
    spec = next((job.spec for job in jobs if job.spec.data.packing), jobs[0].spec)  # packed rows need positions
    batch = collator(spec, base)([row for rows in batches for row in rows])
    enabled = computes_bfloat16(jobs[0].spec)
    with torch.autocast(base.model.device.type, torch.bfloat16, enabled=enabled):
        return shared_losses(base.model, batch, [job.pairs for job in jobs], [len(rows) for rows in batches])


def _update(job: _Job, loss: float, step: int) -> None:
    """Clip, step, and log as a run of its own does."""
    t = job.spec.training
    norm = nn.utils.clip_grad_norm_(job.parameters, t.max_grad_norm or float("inf"))
    rate = job.optimizer.param_groups[0]["lr"]
    job.optimizer.step()
    job.schedule.step()
    job.optimizer.zero_grad()
    job.losses.append(loss)
    if step % t.logging_steps == 0:
        recent = job.losses[-t.logging_steps :]
        mean = sum(recent) / len(recent)
        job.entries.append({"step": step, "loss": mean, "grad_norm": float(norm), "learning_rate": rate})


def _finish(job: _Job, base: LoadedModel) -> dict[str, Any]:
    """Put the factors into PEFT's own layers, evaluate, and write what a run of its own leaves."""
    spec, parts = _on(job.spec, base), job.parts
    write_text(job.folder / runs.METRICS, "".join(json.dumps(entry) + "\n" for entry in job.entries))
    with trainee(spec, parts) as loaded:
        with torch.no_grad():
            for name, layer in _lora_layers(loaded).items():
                layer.lora_A["default"].weight.copy_(job.pairs[name].a)
                layer.lora_B["default"].weight.copy_(job.pairs[name].b)
        measured = validation_set(spec, loaded, parts)
        found: dict[str, Any] = {"eval_loss": None}
        if measured is not None:
            quiet = spec.model_copy(update={"training": spec.training.model_copy(update={"report_to": ()})})
            run = Run(job.folder, job.name, None, True)
            metrics = (job.folder / runs.METRICS).read_text(encoding="utf-8")
            found = evaluated(make_trainer(quiet, run, loaded, job.trained, measured, parts))
            write_text(job.folder / runs.METRICS, metrics + json.dumps({"step": job.steps, **found}) + "\n")
        save(job.spec, loaded, job.folder)
        trained = sum(p.numel() for p in job.parameters)
        numbers = {
            "steps": job.steps,
            "train_loss": sum(job.losses) / len(job.losses),
            **found,
            "trainable_parameters": trained,
            "parameters": sum(p.numel() for p in loaded.model.parameters()),
            "data": job.trained.report,
        }
    shutil.rmtree(job.folder / runs.CHECKPOINTS, ignore_errors=True)  # transformers makes it in any case
    write_records(job.spec, job.folder, job.name, numbers, runs.hash_data(job.spec))
    return numbers
