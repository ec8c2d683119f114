"""The training spec."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field, PlainSerializer, model_validator

from toolkit.adapters.catalogue import FULL
from toolkit.specs import Folder, FolderOrObject, Spec

Base = Annotated[
    FolderOrObject,
    PlainSerializer(lambda b: str(b) if isinstance(b, str | Path) else getattr(b, "source", type(b).__name__)),
]
"""A folder, a hub id, `toolkit:base`, or a pair `(model, tokenizer)` in memory."""


def as_sources(value: Any) -> Any:
    """Return a list of sources where one was given."""
    listed = [value] if isinstance(value, str | Path | Mapping | SourceSpec) else value
    return [str(v) if isinstance(v, Path) else v for v in listed] if isinstance(listed, list) else listed


def as_method(value: Any) -> Any:
    """Return a method's block where its name alone was given."""
    return {"method": value} if isinstance(value, str) else value


def as_methods(value: Any) -> Any:
    """Return a list of methods where one was given."""
    return [value] if isinstance(value, str | Mapping | MethodSpec) else value


class MethodSpec(Spec):
    """A method by name, with its own fields beside it.

    Attributes:
        method: its name.
    """

    model_config = ConfigDict(extra="allow")

    method: str

    @property
    def fields(self) -> dict[str, Any]:
        """The method's own fields."""
        return dict(self.model_extra or {})


Chosen = Annotated[MethodSpec, BeforeValidator(as_method)]
"""A method's block, or its name alone."""


class AdapterSpec(MethodSpec):
    """What is trained.

    Attributes:
        method: any that PEFT has, in lower case, with the fields of its configuration beside it; or `full`: the
            model's own weights.
        layers: numbers of the layers that are trained, from 0, or from -1 at the end; all by default. With `full`
            embeddings, last norm and head are trained only where all layers are.
    """

    method: str = "lora"
    layers: Annotated[tuple[int, ...], Field(min_length=1)] | None = None


class SourceSpec(Spec):
    """One file or data set.

    Attributes:
        path: a JSONL, CSV or Parquet file, a folder that holds a data set, or a hub id.
        split: of a data set.
        subset: of a data set that has several.
        fields: its own name of a field, by the name that it gets: `{prompt: question, completion: answer}`.
        weight: its share of the rows of an epoch, up to a common factor.
        task: which task its rows are, for methods that learn several at once.
    """

    path: str
    split: str = "train"
    subset: str | None = None
    fields: dict[str, str] = Field(default_factory=dict)
    weight: Annotated[float, Field(gt=0)] | None = None
    task: str | None = None


Sources = Annotated[list[str | SourceSpec], BeforeValidator(as_sources), Field(min_length=1)]
"""One file or data set, or a list of them; a path alone stands for a source with nothing else to say."""


class DataSpec(Spec):
    """What it is trained on.

    Attributes:
        train: files and data sets with rows of `prompt` and `completion`, `messages`, or `text`.
        validation: those on which the loss is measured.
        temperature: above 1, small sources give more rows and large ones fewer: shares are the sizes to the power
            `1 / temperature`.
        epoch_rows: rows of an epoch, where sources have weights or a temperature; by default as many as they have.
        train_on_inputs: train prompts as well as answers.
        max_length: most tokens of a row; by default what the model can take, which only packed rows may exceed.
        packing: put several short rows into one, kept apart from each other; refused for a model that cannot.
        batches: rows of like length in a batch, so that little of it is padding; or any.
        streaming: read rows as they are trained, instead of all of them before the first step; needs
            `training.max_steps`. Sources are drawn by their weights, which are equal where none are given.
        buffer: rows that are read ahead of a stream: shuffled, sorted by length and packed together.
        too_long: what to do with a longer row.
        empty: what to do with a row in which no token is trained.
    """

    train: Sources
    validation: Sources | None = None
    temperature: Annotated[float, Field(ge=1)] | None = None
    epoch_rows: Annotated[int, Field(ge=1)] | None = None
    train_on_inputs: bool = False
    max_length: Annotated[int, Field(ge=2)] | None = None
    packing: bool = False
    batches: Literal["by_length", "random"] = "by_length"
    streaming: bool = False
    buffer: Annotated[int, Field(ge=1)] = 2000
    too_long: Literal["error", "truncate", "skip"] = "error"
    empty: Literal["error", "skip"] = "error"

    @model_validator(mode="after")
    def _consistent(self) -> DataSpec:
        weighted = [source.weight is not None for source in self.sources()]
        if any(weighted) and self.temperature is not None:
            raise ValueError("weights and a temperature both say how much each source gives; leave one out")
        if any(weighted) and not all(weighted):
            raise ValueError("some sources of train have a weight; give every one of them one")
        if self.streaming and (self.temperature is not None or self.epoch_rows is not None):
            raise ValueError("a stream has no size, so temperature and epoch_rows say nothing; give weights instead")
        if self.epoch_rows is not None and not any(weighted) and self.temperature is None:
            raise ValueError("epoch_rows needs weights of the sources, or a temperature")
        return self

    def sources(self, validation: bool = False) -> list[SourceSpec]:
        """Return the sources of `train`, or of `validation`."""
        chosen = (self.validation or ()) if validation else self.train
        return [SourceSpec(path=source) if isinstance(source, str) else source for source in chosen]


class TrainingSpec(Spec):
    """How it is trained; the names are those of transformers.

    Attributes:
        num_epochs: passes over the data, when `max_steps` is not given.
        max_steps: optimizer steps.
        batch_size: rows per forward pass and device.
        batch_tokens: tokens per forward pass and device, padding included, instead of rows: many short ones, few long.
        gradient_accumulation_steps: forward passes per optimizer step.
        learning_rate: at its peak.
        lr_scheduler: its course, unless one of `methods` sets it.
        warmup_steps: steps in which it rises; below 1 a share of all steps.
        weight_decay: of AdamW.
        max_grad_norm: gradients are scaled down to this norm; 0 leaves them.
        optimizer: as transformers names it, unless one of `methods` sets it.
        methods: ways to train, each by its name, or its name and its parameters.
        precision: `auto` is bfloat16 where the device computes with it, else float32.
        seed: of the initial adapter, the order of the data, and dropout.
        logging_steps: steps between two entries of the metrics.
        eval_steps: steps between two evaluations; by default one per epoch.
        save_steps: steps between two checkpoints, which `--resume` goes on from; by default none are made. Early
            stopping makes one at every evaluation besides.
        save_total_limit: newest checkpoints that are kept, besides the best one that early stopping needs.
        keep_checkpoints: leave them beside the result of a finished run.
        early_stopping_patience: evaluations without a better loss after which training stops; the best
            checkpoint is then the result.
        gradient_checkpointing: recompute activations in the backward pass to save memory.
        fsdp: transformers' argument of this name, such as `full_shard auto_wrap`.
        fsdp_config: its settings.
        deepspeed: DeepSpeed's configuration, or a file of it.
        report_to: besides the JSONL file of metrics; `plot` draws the losses into `loss.png` at the end.
    """

    num_epochs: Annotated[float, Field(gt=0)] = 1.0
    max_steps: Annotated[int, Field(ge=1)] | None = None
    batch_size: Annotated[int, Field(ge=1)] = 8
    batch_tokens: Annotated[int, Field(ge=1)] | None = None
    gradient_accumulation_steps: Annotated[int, Field(ge=1)] = 1
    learning_rate: Annotated[float, Field(gt=0)] = 2e-4
    lr_scheduler: Literal["linear", "cosine", "constant", "constant_with_warmup", "polynomial"] = "linear"
    warmup_steps: Annotated[float, Field(ge=0)] = 0
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    max_grad_norm: Annotated[float, Field(ge=0)] = 1.0
    optimizer: str = "adamw_torch"
    methods: Annotated[tuple[Chosen, ...], BeforeValidator(as_methods)] = ()
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    seed: Annotated[int, Field(ge=0)] = 0
    logging_steps: Annotated[int, Field(ge=1)] = 10
    eval_steps: Annotated[int, Field(ge=1)] | None = None
    save_steps: Annotated[int, Field(ge=1)] | None = None
    save_total_limit: Annotated[int, Field(ge=1)] = 2
    keep_checkpoints: bool = False
    early_stopping_patience: Annotated[int, Field(ge=1)] | None = None
    gradient_checkpointing: bool = False
    fsdp: str | bool | None = None
    fsdp_config: dict[str, Any] | None = None
    deepspeed: dict[str, Any] | Folder | None = None
    report_to: tuple[Literal["tensorboard", "plot", "wandb", "trackio"], ...] = ("tensorboard",)


class AfterSpec(Spec):
    """What is made of an adapter once it is trained, besides its own folder.

    Attributes:
        merge: folder to write: the base with the adapter in its weights.
        lora: folder to write: the adapter as a plain LoRA, for a method of the toolkit that is one exactly.
        serve: folder of adapters that a server watches; this one appears in it whole, under the name of `out`.
        overwrite: replace what is there.
    """

    merge: Folder | None = None
    lora: Folder | None = None
    serve: Folder | None = None
    overwrite: bool = False


class TrainSpec(Spec):
    """A training run.

    Attributes:
        base: model to start from.
        initialize: `pretrained`, or `random` weights for a folder with a config and a tokenizer alone.
        quantization: hold the frozen weights of the base in few bits (QLoRA); needs bitsandbytes and a GPU.
        objective: what is learned from a row, by name, or by name and parameters.
        adapter: what is trained.
        data: what it is trained on.
        training: how.
        out: folder to write: a PEFT adapter, or a model where every weight is trained.
        after: what is made of the adapter then.
        save_dtype: of the weights of such a model, such as bfloat16; by default float32, as they are trained.
        device: `auto`, `cpu`, `cuda`, ...
        trust_remote_code: run code that comes with the model.
    """

    base: Base
    initialize: Literal["pretrained", "random"] = "pretrained"
    quantization: Literal["nf4", "fp4", "int8"] | None = None
    objective: Chosen = MethodSpec(method="completion")
    adapter: AdapterSpec = AdapterSpec()
    data: DataSpec
    training: TrainingSpec = TrainingSpec()
    out: Folder | None = None
    after: AfterSpec = AfterSpec()
    save_dtype: str | None = None
    device: str = "auto"
    trust_remote_code: bool = False

    @model_validator(mode="after")
    def _consistent(self) -> TrainSpec:
        if self.training.early_stopping_patience and not self.data.validation:
            raise ValueError("training.early_stopping_patience needs data.validation")
        if self.save_dtype and self.adapter.method != FULL:
            raise ValueError("save_dtype needs adapter.method: full; adapters are saved as they are trained")
        if self.save_dtype and self.save_dtype not in ("float32", "bfloat16", "float16"):
            raise ValueError(f"save_dtype is float32, bfloat16 or float16, not {self.save_dtype}")
        if self.data.streaming and self.training.max_steps is None:
            raise ValueError("data.streaming needs training.max_steps; a stream has no end")
        if self.data.streaming and self.training.batch_tokens:
            raise ValueError("training.batch_tokens sorts all rows first; leave it out, or set data.streaming to false")
        if self.quantization and (self.adapter.method == FULL or self.initialize == "random"):
            raise ValueError("quantization needs an adapter on a pretrained base; weights of few bits are not trained")
        if self.after != AfterSpec() and self.adapter.method == FULL:
            raise ValueError("after needs an adapter; a fully trained model is in out already")
        if self.initialize == "random" and self.adapter.method != FULL:
            raise ValueError(
                "initialize: random needs adapter.method: full; an adapter of random weights learns nothing"
            )
        return self
