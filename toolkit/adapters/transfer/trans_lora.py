"""Trans-LoRA: move an adapter to another base, with made-up data in the place of the data that it was trained on.

The target makes prompts up from about five seeds; a discriminator, trained on the source's side with the original data,
rejects what is unlike it; source base and adapter, the teacher, answer; a new adapter of any type learns the target to
answer so. Where both models have the same tokens it learns the teacher's distributions, else its texts.

Wang et al., "Trans-LoRA: towards data-free Transferable Parameter Efficient Finetuning", 2024, arXiv:2405.17258.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toolkit import specs
from toolkit.adapters.config import peft_config
from toolkit.adapters.spec import TrainSpec
from toolkit.adapters.train import TrainResult, train
from toolkit.adapters.transfer.spec import DiscriminatorSpec, TransferSpec
from toolkit.checkpoints.writer import check_free, commit, locked, staging_path, write_text
from toolkit.data.rows import Row, read_rows, user_text, write_rows
from toolkit.errors import DataError, OutputError, Problem, SpecError
from toolkit.models.load import LoadedModel, load_model, pick_device, quiet_transformers
from toolkit.progress import track
from toolkit.tables import Report, Table

_SPEC, _PROMPTS, _ROWS = "transfer.json", "prompts.jsonl", "synthetic.jsonl"


@dataclass(frozen=True)
class TransferResult(Report):
    """A finished transfer.

    Attributes:
        path: folder of the new adapter, with the made-up rows beside it.
    """

    path: Path = Path()


def transfer(
    spec: specs.Source | TransferSpec,
    out: str | Path | None = None,
    *,
    overrides: Sequence[str] = (),
    smoke: bool = False,
    resume: bool = False,
    overwrite: bool = False,
    quiet: bool = False,
) -> TransferResult:
    """Move an adapter to another base.

    Args:
        spec: a YAML file, a dict or a `TransferSpec`.
        out: folder to write, instead of the spec's own.
        overrides: `key.path=value` changes to the spec.
        smoke: apply the spec's own `smoke:` block.
        resume: go on with a transfer into `out` that was stopped.
        overwrite: replace `out` if it exists.
        quiet: show no progress.

    Raises:
        SpecError: the spec is wrong, or asks for what the two tokenizers do not allow.
        DataError: seeds that cannot be used, or the discriminator takes none of the candidates.
        MissingError: no such model, adapter or file.
        OutputError: `out` exists, or there is nothing to resume.
    """
    loaded = specs.load(spec, TransferSpec, overrides=overrides, smoke=smoke)
    config, found = peft_config(loaded.adapter)
    if not (out or loaded.out):
        found = [*found, Problem("out", "required: the folder to write")]
    if found or config is None:
        raise loaded.error(found)
    folder = Path(out or loaded.out or "").expanduser()
    check_free(folder, overwrite=overwrite)
    seeds = read_rows(loaded.seeds)
    with locked(staging_path(folder)) as partial, quiet_transformers():
        _begin(loaded, partial, resume)
        try:
            numbers = _run(loaded, config, seeds, partial, quiet)
            commit(partial, folder)
        finally:
            if partial.exists() and not (partial / _PROMPTS).is_file():
                shutil.rmtree(partial)  # nothing in it that could be resumed
    numbers["path"] = str(folder)
    rows = [[key.replace("_", " "), value if value is None else str(value)] for key, value in numbers.items()]
    return TransferResult(numbers, [Table(("transfer", folder.name), rows)], folder)


def _begin(spec: TransferSpec, partial: Path, resume: bool) -> None:
    text = json.dumps(spec.model_dump(mode="json", exclude={"out"}), indent=2, default=str) + "\n"
    if resume:
        if not (partial / _SPEC).is_file():
            raise OutputError(f"{partial.name}: nothing to resume")
        if (partial / _SPEC).read_text(encoding="utf-8") != text:
            raise OutputError(f"{partial.name}: was begun with another spec; resume with that, or begin anew")
        return
    for name in partial.iterdir():
        if name.is_dir():
            shutil.rmtree(name)
        elif name.suffix != "":
            name.unlink()
    write_text(partial / _SPEC, text)


def _run(spec: TransferSpec, config: Any, seeds: Sequence[Row], partial: Path, quiet: bool) -> dict[str, Any]:
    from toolkit.adapters.state import save_adapter
    from toolkit.adapters.transfer.distil import OPTIMIZER, TRAINED, distil, loss_kind

    chat = "messages" in seeds[0].data
    with _model(spec, spec.target) as target:
        tried = _make_prompts(spec, target, [user_text(row) for row in seeds], partial, quiet)
        rows = _make_rows(spec, partial, chat, quiet)
        with ExitStack() as stack:
            teacher = stack.enter_context(_teacher(spec))
            kind = loss_kind(spec.distillation, teacher.tokenizer, target.tokenizer, [user_text(row) for row in rows])
            examples = _examples(target, rows)
            student = stack.enter_context(_student(config, target, spec.distillation.seed))
            losses = distil(
                student, teacher if kind == "logits" else None, examples, spec.distillation, partial, quiet=quiet
            )
            save_adapter(student.model, partial)  # pyright: ignore[reportArgumentType]
            trained = sum(value.numel() for value in student.model.parameters() if value.requires_grad)
    for name in (TRAINED, OPTIMIZER, _PROMPTS):
        (partial / name).unlink(missing_ok=True)
    return {
        "rows": len(rows),
        "candidates": tried,
        "loss": kind,
        "final_loss": losses[-1] if losses else None,
        "trainable_parameters": trained,
    }


@contextmanager
def _model(spec: TransferSpec, base: Any) -> Iterator[LoadedModel]:
    import torch

    yield load_model(
        base, device=pick_device(spec.device), dtype=torch.float32, trust_remote_code=spec.trust_remote_code
    )


def _teacher(spec: TransferSpec, adapter: str | None = None) -> Any:
    from toolkit.adapters.transfer.synthetic import adapted

    options = {"device": pick_device(spec.device), "trust_remote_code": spec.trust_remote_code}
    return adapted(spec.source.base, adapter or spec.source.adapter, **options)


@contextmanager
def _student(config: Any, target: LoadedModel, seed: int) -> Iterator[LoadedModel]:
    import torch
    from peft import get_peft_model

    torch.manual_seed(seed)
    model: Any = get_peft_model(target.model, config)
    model.peft_config["default"].base_model_name_or_path = target.source
    try:
        yield LoadedModel(target.source, model, target.tokenizer)
    finally:
        if hasattr(model.base_model, "unload"):
            model.base_model.unload()


def _make_prompts(spec: TransferSpec, target: LoadedModel, seeds: Sequence[str], partial: Path, quiet: bool) -> int:
    """Write the prompts that the discriminator takes; return how many candidates there were."""
    from toolkit.adapters.transfer.synthetic import discriminator, gather

    with ExitStack() as stack:
        judge = None
        if spec.discriminator:
            judge = discriminator(stack.enter_context(_teacher(spec, spec.discriminator)))
        prompts, tried = gather(target, seeds, spec.synthetic, judge, spec.threshold, partial / _PROMPTS, quiet=quiet)
    if not prompts:
        raise DataError(
            f"none of {tried} candidates was taken; lower threshold, raise synthetic.attempts, or give other seeds"
        )
    return tried


def _make_rows(spec: TransferSpec, partial: Path, chat: bool, quiet: bool) -> list[Row]:
    """Have the teacher answer every prompt that it has not answered yet."""
    from toolkit.adapters.transfer.synthetic import answers, as_row

    prompts: list[str] = json.loads((partial / _PROMPTS).read_text(encoding="utf-8"))["prompts"]
    file, size = partial / _ROWS, spec.synthetic.batch_size
    rows: list[Mapping[str, Any]] = [row.data for row in read_rows(file)] if file.is_file() else []
    if len(rows) < len(prompts):
        with _teacher(spec) as teacher, track("answering", len(prompts), unit="rows", quiet=quiet) as progress:
            progress.advance(len(rows))
            while len(rows) < len(prompts):
                batch = prompts[len(rows) : len(rows) + size]
                replies = answers(teacher, batch, spec.synthetic, chat=chat)
                rows += [as_row(p, a, chat=chat) for p, a in zip(batch, replies, strict=True)]
                write_rows(file, rows)
                progress.advance(len(batch))
    return read_rows(file)


def _examples(target: LoadedModel, rows: Sequence[Row]) -> list[Any]:
    from toolkit.data.render import Renderer

    limit = getattr(target.model.config.get_text_config(), "max_position_embeddings", None) or 1 << 30
    return Renderer(target.tokenizer, limit, "skip", "skip").render_all(rows)[0]


def train_discriminator(
    spec: specs.Source | DiscriminatorSpec,
    out: str | Path | None = None,
    *,
    overwrite: bool = False,
    quiet: bool = False,
) -> TrainResult:
    """Train an adapter of the source's base to tell real requests of a task from made-up ones.

    It is the only step that sees original data, and goes with the adapter to whoever moves it.

    Args:
        spec: a YAML file, a dict or a `DiscriminatorSpec`.
        out: folder to write, instead of the spec's own.
        overwrite: replace `out` if it exists.
        quiet: show no progress.

    Raises:
        As `train`.
    """
    from tempfile import TemporaryDirectory

    from toolkit.adapters.transfer.synthetic import ANSWERS, QUESTION, gather

    loaded = specs.load(spec, DiscriminatorSpec)
    if not (out or loaded.out):
        raise SpecError([Problem("out", "required: the folder to write")])
    real = [user_text(row) for row in read_rows(loaded.real)]
    with TemporaryDirectory() as folder, quiet_transformers():
        base = load_model(loaded.base, device=pick_device(loaded.device))
        size = loaded.synthetic.model_copy(update={"count": min(loaded.synthetic.count, len(real))})
        made, _ = gather(base, real, size, None, 0.0, Path(folder) / _PROMPTS, quiet=quiet)
        rows = [{"prompt": QUESTION.format(text), "completion": ANSWERS[0]} for text in real[: len(made)]]
        rows += [{"prompt": QUESTION.format(text), "completion": ANSWERS[1]} for text in made if text not in real]
        write_rows(Path(folder) / "rows.jsonl", rows)
        data = {"train": str(Path(folder) / "rows.jsonl")}
        training = TrainSpec.model_validate(
            {"base": loaded.base, "data": data, "adapter": loaded.adapter, "training": loaded.training}
            | {"device": loaded.device}
        )
        return train(training, out or loaded.out, overwrite=overwrite, quiet=quiet)
