"""One seed of the study: heads, fine-tunes and joint training on disk, and one model that takes any weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.eight_tasks import encoder
from benchmarks.eight_tasks.data import TaskData, read_tasks, shifted, write_split
from toolkit.checkpoints.compressed import on_base, open_change
from toolkit.checkpoints.reader import Checkpoint, open_checkpoint
from toolkit.checkpoints.writer import staged, write_text
from toolkit.errors import OutputError
from toolkit.merge.learning.heads import Head, read_head, write_head
from toolkit.merge.statistics.models import fill, tensor_names
from toolkit.models.load import quiet_transformers
from toolkit.progress import track

Scores = dict[str, float]
"""Percent right by task."""


@dataclass(frozen=True)
class Settings:
    """What a run depends on; a folder holds the results of one of these.

    Attributes:
        data: folder of the tasks.
        base: folder of the encoder.
        limit: most training rows of a task.
        evaluated: most validation and most test rows of a task; `None` for all.
        epochs: of fine-tuning and of joint training.
        rate: largest learning rate of full fine-tuning; of LoRA ten times as much.
        rank: of LoRA; `None` for full fine-tuning.
        steps: of every learned merge.
        batch_size: rows of each task in such a step.
    """

    data: Path
    base: Path
    limit: int | None = 4000
    evaluated: int | None = None
    epochs: int = 2
    rate: float = 5e-5
    rank: int | None = None
    steps: int = 200
    batch_size: int = 16

    def numbers(self) -> dict[str, Any]:
        """Return all but the places of files."""
        return {key: value for key, value in asdict(self).items() if not isinstance(value, Path)}

    def stamp(self, folder: Path) -> None:
        """Note the settings in a folder, or refuse one that holds results of others.

        Raises:
            OutputError: it does.
        """
        own = {key: str(value) if isinstance(value, Path) else value for key, value in asdict(self).items()}
        file = folder / "settings.json"
        if file.is_file():
            there = json.loads(file.read_text(encoding="utf-8"))
            different = [
                f"{key} {there.get(key)!r}, not {value!r}" for key, value in own.items() if there.get(key) != value
            ]
            if different:
                raise OutputError(f"{folder}: holds a run with {'; '.join(different)}; name another folder")
        folder.mkdir(parents=True, exist_ok=True)
        write_text(file, json.dumps(own, indent=2) + "\n")


class Study:
    """Everything of one seed; what is on disk is not made again.

    Args:
        settings: of the run.
        folder: of this seed.
        seed: of the order of the rows, of dropout and of random merges.
        quiet: show no progress.
    """

    def __init__(self, settings: Settings, folder: Path, seed: int, *, quiet: bool = False) -> None:
        self.settings, self.folder, self.seed, self.quiet = settings, folder, seed, quiet
        self.tasks: dict[str, TaskData] = read_tasks(settings.data, limit=settings.limit, evaluated=settings.evaluated)
        self._tokens: dict[tuple[str, str, str | None], encoder.Tokens] = {}

    # What is trained.

    def prepare(self) -> None:
        """Fit the heads, fine-tune every task, and train one encoder on all of them."""
        self._fit_heads()
        for name in self.tasks:
            self.make(f"individual/{name}", lambda out, name=name: self._tune([name], out))
        self.make("joint", lambda out: self._tune(list(self.tasks), out))

    def tune_on(self, task: str, shift: str, out: Path) -> None:
        """Fine-tune a task on shifted texts."""
        self._tune([task], out, shift)

    def make(self, name: str, write: Callable[[Path], None]) -> Path:
        """Return a folder of this seed, made by `write` if it is not there."""
        out = self.folder / name
        if not out.is_dir():
            with staged(out) as partial:
                write(partial)
        return out

    def _fit_heads(self) -> None:
        missing = [name for name in self.tasks if not (self.folder / "heads" / name).is_dir()]
        with track("heads", len(missing), unit="tasks", quiet=self.quiet) as progress:
            for name in missing:
                vectors = {s: encoder.features(self.runner, self.tokens(name, s)) for s in ("train", "validation")}
                write_head(encoder.fit_head(vectors, self.tasks[name]), self.folder / "heads" / name)
                progress.advance()

    def _tune(self, names: Sequence[str], out: Path, shift: str | None = None) -> None:
        loaded, settings = encoder.load(self.settings.base), self.settings
        adapted = encoder.with_lora(loaded, settings.rank, self.seed) if settings.rank else None
        what = names[0] if len(names) == 1 else "all tasks"
        encoder.fine_tune(
            loaded,
            self.heads,
            {name: self.tasks[name].targets["train"] for name in names},
            {name: self.tokens(name, "train", shift) for name in names},
            epochs=settings.epochs,
            rate=settings.rate * (10 if adapted is not None else 1),
            seed=self.seed,
            label=f"seed {self.seed}: {what}" + (f" with {shift}" if shift else ""),
            quiet=self.quiet,
        )
        if adapted is None:
            encoder.save(loaded, out)
        else:
            with quiet_transformers():
                adapted.save_pretrained(out)

    # What is measured.

    @cached_property
    def heads(self) -> dict[str, Head]:
        """The heads of all tasks."""
        return {name: read_head(self.folder / "heads" / name) for name in self.tasks}

    @property
    def individual(self) -> dict[str, str]:
        """The fine-tunes by task."""
        return {name: str(self.folder / "individual" / name) for name in self.tasks}

    @property
    def base(self) -> str:
        """The base."""
        return str(self.settings.base)

    def tokens(self, task: str, split: str, shift: str | None = None) -> encoder.Tokens:
        """Return the tokens of a split, shifted at will."""
        key = task, split, shift
        if key not in self._tokens:
            texts = self.tasks[task].texts[split]
            self._tokens[key] = encoder.tokenize(self.runner, shifted(texts, shift) if shift else texts)
        return self._tokens[key]

    def rows(self, split: str, shift: str | None = None) -> dict[str, str]:
        """Return files with the rows of a split of every task."""
        place = self.folder / "rows" / (split if shift is None else f"{split}-{shift}")
        files = {}
        for name, task in self.tasks.items():
            texts = shifted(task.texts[split], shift) if shift else None
            file = place / f"{name}.jsonl"
            files[name] = str(file if file.is_file() else write_split(task, split, file, texts))
        return files

    @cached_property
    def runner(self) -> Any:
        """The model that is run, whatever its weights are at the moment."""
        return encoder.load(self.settings.base)

    @cached_property
    def start(self) -> dict[str, Tensor]:
        """The base's weights, by the model's names."""
        return {
            name: value.detach().clone() for name, value in encoder.load(self.settings.base).model.named_parameters()
        }

    def use(self, source: str) -> None:
        """Give the model the weights of a full checkpoint, a LoRA folder or a compressed fine-tune."""
        with self.open(source) as weights:
            names = tensor_names(self.runner.model, weights)
            for name, parameter in self.runner.model.named_parameters():
                if name in names:
                    fill(parameter, weights, names[name])

    def open(self, source: str) -> Checkpoint:
        """Open the full weights of a model."""
        change = open_change(source)
        return open_checkpoint(source) if change is None else on_base(open_checkpoint(self.base), change)

    def place(self, change: Mapping[str, Tensor], scale: float) -> None:
        """Give the model the base's weights and a change of them, times a number."""
        with torch.no_grad():
            for name, parameter in self.runner.model.named_parameters():
                parameter.copy_(self.start[name] + scale * change[name] if name in change else self.start[name])

    def change(self) -> dict[str, Tensor]:
        """Return what the model's weights now differ from the base's by."""
        return {name: value.detach() - self.start[name] for name, value in self.runner.model.named_parameters()}

    def measure(self, split: str, shift: str | None = None, tasks: Sequence[str] | None = None) -> Scores:
        """Return the percent of right predictions of tasks, with the model as it stands."""
        return {
            name: encoder.accuracy(
                self.runner, self.heads[name], self.tokens(name, split, shift), self.tasks[name].targets[split]
            )
            for name in (self.tasks if tasks is None else tasks)
        }

    def measure_each(self, models: Mapping[str, str], split: str, shift: str | None = None) -> Scores:
        """Return the percent of right predictions of every task with a model of its own."""
        scores: Scores = {}
        for name, model in models.items():
            self.use(model)
            scores |= self.measure(split, shift, [name])
        return scores

    def row(self, name: str, compute: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
        """Return a row of the table, from its file if it was measured before."""
        file = self.folder / "scores" / f"{name}.json"
        if not file.is_file():
            file.parent.mkdir(parents=True, exist_ok=True)
            write_text(file, json.dumps(dict(compute()), indent=2) + "\n")
        return json.loads(file.read_text(encoding="utf-8"))

    def forget(self, name: str) -> None:
        """Delete a folder that is not needed any more."""
        shutil.rmtree(self.folder / name, ignore_errors=True)
