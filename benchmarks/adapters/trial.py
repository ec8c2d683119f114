"""One trial: a method trained at a rate, loaded again from its folder, and scored."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
from peft import PeftModel

from benchmarks.adapters.data import Task
from benchmarks.adapters.spec import CompareSpec, Contender
from benchmarks.allocated import peak_bytes
from toolkit import specs
from toolkit.adapters import catalogue
from toolkit.adapters.catalogue import FULL
from toolkit.adapters.config import faults
from toolkit.adapters.loop import token_losses
from toolkit.adapters.methods.vl_adapter import takes_task_ids
from toolkit.adapters.spec import TrainSpec
from toolkit.adapters.train import train
from toolkit.adapters.trainer import collator
from toolkit.checkpoints.writer import write_text
from toolkit.data.pack import alone
from toolkit.data.render import IGNORED, Renderer
from toolkit.data.rows import read_rows
from toolkit.models.load import LoadedModel, load_model, quiet_transformers

_BATCH = 32
"""Rows of a forward pass in scoring."""


class Score(NamedTuple):
    """How a model answers.

    Attributes:
        right: answers in which every token is the likeliest one after those before it, in percent; so many answers
            greedy decoding gets exactly right.
        loss: of a trained token, in nats.
    """

    right: float
    loss: float


class Trials:
    """Runs trials, each once: what was measured lies in a folder by an identity of everything it depends on.

    Args:
        spec: of the comparison.
        tasks: its columns.
        longest: file of the rows that need the most memory.
        out: folder of the results.

    Attributes:
        rates: of the methods, once they are chosen; sources of other methods are trained with them.
    """

    def __init__(self, spec: CompareSpec, tasks: Sequence[Task], longest: Path, out: Path) -> None:
        self.spec, self.tasks, self.longest, self.out = spec, tasks, longest, out
        self.rates: dict[str, float] = {}

    def scores(self, method: Contender, tasks: Sequence[Task], rate: float, seed: int) -> list[dict[str, Any]]:
        """Train a method on tasks, one by one, or at once on all columns; return what each training came to.

        Returns:
            Of each training its trained parameters, CPU seconds, and `scores`: a split's score by task and split.
        """
        groups = [self.tasks] if method.joint else [[task] for task in tasks]
        return [self._score(method, group, rate, seed) for group in groups]

    def memory(self, method: Contender, rate: float) -> int:
        """Return the most bytes that torch held at once in two steps on the longest rows, the loading included."""
        rows = [replace(task, folder=self.longest.parent) for task in (self.tasks if method.joint else self.tasks[:1])]
        spec = self.train_spec(method, rows, rate, self.spec.seeds[0], max_steps=2, file=self.longest.name)

        def peak(folder: Path) -> dict[str, int]:
            return {"bytes": peak_bytes(lambda: train(spec, folder, quiet=True))}

        return self._once(spec, [], peak)["bytes"]

    def base(self, task: Task) -> Score:
        """Return the score of the base on a task's test rows."""
        spec = self.train_spec(Contender(name="base", adapter={"method": FULL}), [task], 1.0, 0)

        def score(_: Path) -> dict[str, Score]:
            return {"test": _score(spec, load_model(self.spec.base), task.file("test"))}

        return Score(*self._once({"base": self.spec.base}, [task.file("test")], score)["test"])

    def train_spec(
        self,
        method: Contender,
        tasks: Sequence[Task],
        rate: float,
        seed: int,
        *,
        file: str = "train.jsonl",
        **changes: Any,
    ) -> dict[str, Any]:
        """Return the spec of a training run on a file of every task's folder, `changes` in its training block."""
        known = catalogue.find(method.adapter.get("method", "lora")) if method.joint else None
        sources = [{"path": str(t.folder / file)} | ({"task": t.name} if method.joint else {}) for t in tasks]
        tasks_told = {known.task_field: len(tasks)} if known and known.task_field else {}
        training = {"report_to": [], "learning_rate": rate, "seed": seed}
        return {
            "base": self.spec.base,
            "adapter": method.adapter | tasks_told | self._sources(method, tasks),
            "data": {"train": sources, "too_long": "skip"},
            "training": self.spec.training | training | method.training | changes,
            "device": "cpu",
        }

    def _sources(self, method: Contender, tasks: Sequence[Task]) -> dict[str, Any]:
        """Return the field that names a method's sources: adapters for the skills of all columns but its own."""
        if method.sources is None:
            return {}
        of = next(other for other in self.spec.methods if other.name == method.sources)
        rate, chosen = self.rates.get(of.name, 1.0), {task.name for task in tasks}
        skills = [task for task in self.tasks if task.name in self.spec.skills and task.name not in chosen]
        return {"sources": {task.name: str(self._adapter(of, task, rate)) for task in skills}}

    def _adapter(self, method: Contender, task: Task, rate: float) -> Path:
        """Return the folder of a trained adapter, which is made where it is not there yet."""
        spec = self.train_spec(method, [task], rate, self.spec.seeds[0])
        folder = self.out / "adapters" / _digest(spec, [])
        if not folder.is_dir() and method.name in self.rates:
            train(spec, folder, quiet=True)
        return folder

    def check(self) -> None:
        """Refuse a list in which a method's spec is wrong, before any of them runs.

        Raises:
            SpecError: it is.
        """
        for method in self.spec.methods:
            tasks = self.tasks if method.joint else self.tasks[:1]
            spec = specs.load(self.train_spec(method, tasks, self.spec.rates[0], 0), TrainSpec)
            if found := faults(spec):
                raise spec.error(found)

    def _score(self, method: Contender, tasks: Sequence[Task], rate: float, seed: int) -> dict[str, Any]:
        spec = self.train_spec(method, tasks, rate, seed)
        read = [task.file(split) for task in tasks for split in ("validation", "test")]
        return self._once(spec, read, lambda folder: _trained(spec, tasks, folder))

    def _once(self, spec: Mapping[str, Any], read: Sequence[Path], run: Callable[[Path], Any]) -> dict[str, Any]:
        record = self.out / "trials" / f"{_digest(spec, read)}.json"
        if not record.is_file():
            with TemporaryDirectory(dir=self.out) as folder:
                found = run(Path(folder) / "trained")
            record.parent.mkdir(exist_ok=True)
            write_text(record, json.dumps({"spec": spec, "found": found}) + "\n")
        return json.loads(record.read_text())["found"]


def _digest(spec: Mapping[str, Any], read: Sequence[Path]) -> str:
    """Return the identity of a trial: its spec, and what is in the files that it reads."""
    files = [*(Path(source["path"]) for source in spec.get("data", {}).get("train", ())), *read]
    identity = [spec, *(hashlib.sha256(file.read_bytes()).hexdigest() for file in files)]
    return hashlib.blake2b(json.dumps(identity, sort_keys=True).encode(), digest_size=12).hexdigest()


def _trained(spec: dict[str, Any], tasks: Sequence[Task], folder: Path) -> dict[str, Any]:
    started = time.process_time()
    result = train(spec, folder, quiet=True)
    seconds = time.process_time() - started
    with quiet_transformers():
        loaded = _loaded(spec, folder)
        scores = {
            task.name: {split: _score(spec, loaded, task.file(split), i) for split in ("validation", "test")}
            for i, task in enumerate(tasks)
        }
    return {
        "cpu_seconds": seconds,
        "trainable_parameters": result.numbers["trainable_parameters"],
        "train_loss": result.numbers["train_loss"],
        "scores": scores,
    }


def _loaded(spec: Mapping[str, Any], folder: Path) -> LoadedModel:
    if spec["adapter"]["method"] == FULL:
        return load_model(folder)
    base = load_model(spec["base"])
    adapted: Any = PeftModel.from_pretrained(base.model, str(folder)).eval()
    takes_task_ids(adapted)
    return LoadedModel(base.source, adapted, base.tokenizer)


def _score(spec: Mapping[str, Any], loaded: LoadedModel, file: Path, task: int = 0) -> Score:
    """Score a model on the rows of a file, teacher-forced: with the right answer so far, what comes next?

    Args:
        spec: of the training.
        loaded: the model.
        file: of the rows.
        task: number of their task, for a model that tells tasks apart.
    """
    collate = collator(specs.load(spec, TrainSpec), loaded)
    render = Renderer(loaded.tokenizer, loaded.tokenizer.model_max_length, too_long="skip")
    examples = [replace(alone(example), task=task) for example in render.render_all(read_rows(file))[0]]
    right, total, tokens = 0, 0.0, 0
    with torch.inference_mode():
        for start in range(0, len(examples), _BATCH):
            batch = collate(examples[start : start + _BATCH])
            labels = batch.pop("labels")
            logits = loaded.model(**batch, use_cache=False).logits
            total += float(token_losses(logits, labels).sum())
            tokens += int((labels[:, 1:] != IGNORED).sum())
            first = logits[:, -labels.shape[1] :][:, :-1].argmax(-1)
            right += int(((first == labels[:, 1:]) | (labels[:, 1:] == IGNORED)).all(1).sum())
    return Score(100 * right / len(examples), total / tokens)
