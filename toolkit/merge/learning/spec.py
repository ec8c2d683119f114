"""The spec of a learned merge: models, tasks with their data, and the parameters that methods share."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from toolkit.checkpoints.compressed import CONFIG, is_compressed
from toolkit.checkpoints.locate import locate
from toolkit.checkpoints.reader import read_json
from toolkit.merge.spec import PlainModel
from toolkit.specs import Files, Folder, Size, Spec

Granularity = Literal["task", "layer", "tensor", "groups"]
Loss = Literal["entropy", "cross_entropy", "contrastive", "distillation"]
Number = Annotated[float, Field(allow_inf_nan=False)]


class LearnTask(Spec):
    """What a task's loss is measured on.

    Attributes:
        data: JSONL files. With a `head` rows are `{text, label}`, and labels are read only by losses that need them;
            for `contrastive` `{text, positive}`; for a language model what `toolkit train` takes, or `{prompt}` alone.
        head: folder of a linear head on an encoder, as `write_head` makes it; it stays as it is.
        positions: of a language model: predictions that count. `last`: the one after a prompt, or after a text;
            `answer`: those of the answer's tokens; `all`.
        limit: most rows that are taken, the first ones.
        weight: of the task's loss in the sum.
    """

    data: Files
    head: Folder | None = None
    positions: Literal["last", "answer", "all"] = "last"
    limit: Annotated[int, Field(ge=1)] | None = None
    weight: Annotated[float, Field(gt=0)] = 1.0


def _tasks(value: Any) -> Any:
    if not isinstance(value, Mapping):
        return value
    return {name: {"data": v} if isinstance(v, str | Path | list) else v for name, v in value.items()}


def _models(value: Any) -> Any:
    """A folder of compressed deltas stands for all fine-tunes that it holds."""
    if isinstance(value, str | Path):
        folder = locate(value)
        if not is_compressed(folder):
            raise ValueError(f"expected name: model for each, or a folder of compressed deltas, got {str(value)!r}")
        return {task: f"{value}#{task}" for task in read_json(folder / CONFIG).get("tasks", {})}
    return value


class LearnSpec(Spec):
    """A learned merge.

    Attributes:
        method: name of a file in `toolkit/merge/learned`.
        base_model: what task vectors are taken from.
        models: the fine-tunes by name: full checkpoints, LoRA folders, `FOLDER#TASK` of compressed deltas; or one
            folder of compressed deltas, for all that it holds.
        tasks: what the loss is measured on, by name; a file name stands for a task's `data`.
        parameters: of the method.
        encoder: run the body of the model and not its language model head; by default where a task has a head, or
            the loss is `contrastive`.
        pooling: of an encoder's tokens to one vector, where there is no head to say so.
        max_length: most tokens of a row; the rest is cut off.
        keep: bytes of task vectors to keep in memory, such as `2GB`, so that not all are read again in every step;
            by default none.
        dtype: of the merged model, as in a merge.
        merged: also write the merged model itself.
        device: to run the model on: `auto`, `cpu`, `cuda`, ...
        out: folder for the results.
    """

    method: str
    base_model: PlainModel
    models: Annotated[dict[str, PlainModel], BeforeValidator(_models), Field(min_length=1)]
    tasks: Annotated[dict[str, LearnTask], BeforeValidator(_tasks)] = Field(default_factory=dict)
    parameters: dict[str, Any] = Field(default_factory=dict)
    encoder: bool | None = None
    pooling: Literal["mean", "cls"] = "mean"
    max_length: Annotated[int, Field(ge=2)] = 256
    keep: Size | None = None
    dtype: str | None = None
    merged: bool = True
    device: str = "auto"
    out: Folder | None = None

    @model_validator(mode="after")
    def _no_copies(self) -> LearnSpec:
        for name, model in self.models.items():
            if model is self.base_model or (isinstance(model, str) and model == self.base_model):
                raise ValueError(f"models.{name}: is the base itself, whose task vector is zero; leave it out")
        return self


class LearnParams(Spec):
    """What a method is told; its own class declares it."""


class CoefficientParams(LearnParams):
    """What methods share that look for coefficients.

    Attributes:
        granularity: one coefficient per model and `task` (the whole model), `layer` (embeddings before the layers and
            what comes after them are one more each), parameter `tensor`, or declared `groups`.
        groups: name -> filters, as in a merge's parameters; the first that matches a tensor's name holds, and the
            tensors of none are one more group, `rest`.
        start: of every coefficient; by default `1 / number of models`.
        bounds: `free`; `clamp` between `low` and `high`; or `simplex`, where the coefficients of all models are at
            least 0 and sum to 1, in every group. They are kept after every step.
        low: smallest value under `clamp`.
        high: largest one.
        seed: of what is random.
        loss: `entropy` of the predictions, which needs no labels; `cross_entropy` of the right ones; `contrastive`
            (InfoNCE) of pairs; or `distillation`, the divergence from the predictions of the task's own model.
        temperature: of `contrastive` and `distillation`.
    """

    granularity: Granularity = "task"
    groups: dict[str, Annotated[list[str], BeforeValidator(lambda v: [v] if isinstance(v, str) else v)]] = Field(
        default_factory=dict
    )
    start: Number | None = None
    bounds: Literal["free", "clamp", "simplex"] = "free"
    low: Number = 0.0
    high: Number = 1.0
    seed: Annotated[int, Field(ge=0)] = 0
    loss: Loss = "entropy"
    temperature: Annotated[float, Field(gt=0)] = 1.0

    @model_validator(mode="after")
    def _fitting(self) -> CoefficientParams:
        if (self.granularity == "groups") != bool(self.groups):
            raise ValueError("groups and granularity: groups belong together")
        if "rest" in self.groups:
            raise ValueError("groups: rest is the group of what no filter matches; choose another name")
        if self.low >= self.high:
            raise ValueError(f"low {self.low:g} is not below high {self.high:g}")
        if self.bounds == "clamp" and self.start is not None and not self.low <= self.start <= self.high:
            raise ValueError(f"start {self.start:g} is not within {self.low:g} to {self.high:g}")
        return self

    def start_of(self, models: int) -> float:
        """Return where every coefficient of so many models starts."""
        return 1 / models if self.start is None else self.start


class DescentParams(CoefficientParams):
    """What methods share that go downhill on the coefficients.

    Attributes:
        optimizer: `adam`, or `sgd` without momentum.
        learning_rate: of the optimizer.
        steps: of the optimizer.
        batch_size: rows of every task in a step.
    """

    optimizer: Literal["adam", "sgd"] = "adam"
    learning_rate: Annotated[float, Field(gt=0)] = 1e-3
    steps: Annotated[int, Field(ge=0)] = 500
    batch_size: Annotated[int, Field(ge=1)] = 16
