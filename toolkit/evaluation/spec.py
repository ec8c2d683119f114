"""The evaluation spec: models in rows, tasks in columns."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from toolkit.specs import Files, Folder, FolderOrObject, Spec

RESERVED = ("base", "auto")
"""What rows call the base and the router's choice."""


class TaskSpec(Spec):
    """One column.

    Attributes:
        data: JSONL files; `exact_match` needs rows with an answer.
        metric: `exact_match`, in percent; or `perplexity` of what training would train.
        max_tokens: most tokens of an answer.
        limit: most rows that are taken, the first ones.
    """

    data: Files
    metric: Literal["exact_match", "perplexity"] = "exact_match"
    max_tokens: Annotated[int, Field(ge=1)] = 64
    limit: Annotated[int, Field(ge=1)] | None = None


class EvaluateSpec(Spec):
    """A table to fill.

    Attributes:
        base: the model that adapters belong to: a folder, a hub id, `toolkit:base`, or a pair `(model, tokenizer)`.
        adapters: PEFT LoRA folders by name.
        models: other full models by name, such as merges; given as the base is.
        router: a router over the adapters, or its folder, for the name `auto`.
        tasks: columns; a file name stands for its `data`.
        rows: label -> a name among `base`, the adapters, the models and `auto`, or a name per task; by default
            one row for each of them.
        over_http: send the requests to a server on localhost instead of calling the engine.
        device: `auto`, `cpu`, `cuda`, ...
        trust_remote_code: run code that comes with the models.
        out: folder for the results.
    """

    base: FolderOrObject
    adapters: dict[str, Folder] = Field(default_factory=dict)
    models: dict[str, FolderOrObject] = Field(default_factory=dict)
    router: FolderOrObject | None = None
    tasks: Annotated[dict[str, TaskSpec], Field(min_length=1)]
    rows: dict[str, str | dict[str, str]] = Field(default_factory=dict)
    over_http: bool = False
    device: str = "auto"
    trust_remote_code: bool = False
    out: Folder | None = None

    @field_validator("tasks", mode="before")
    @classmethod
    def _files(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {name: {"data": v} if isinstance(v, str | Path | list) else v for name, v in value.items()}

    @field_validator("adapters", "models")
    @classmethod
    def _free_names(cls, named: dict[str, Any]) -> dict[str, Any]:
        for name in named:
            if name in RESERVED:
                meaning = "the base itself" if name == "base" else "what the router chooses"
                raise ValueError(f"the name {name!r} means {meaning}; choose another")
        return named

    @property
    def names(self) -> list[str]:
        """Everything that a row can name."""
        return ["base", *self.adapters, *self.models, *(["auto"] if self.router is not None else [])]

    @property
    def table_rows(self) -> dict[str, dict[str, str]]:
        """For each row, the model of each task that it is measured on."""
        rows = self.rows or {name: name for name in self.names}
        return {label: dict.fromkeys(self.tasks, r) if isinstance(r, str) else r for label, r in rows.items()}

    @model_validator(mode="after")
    def _consistent(self) -> EvaluateSpec:
        for label, row in self.table_rows.items():
            for task, name in row.items():
                if task not in self.tasks:
                    raise ValueError(f"rows.{label}: no task {task!r} (known: {', '.join(self.tasks)})")
                if name not in self.names:
                    raise ValueError(f"rows.{label}: no model {name!r} (known: {', '.join(self.names)})")
                if name == "auto" and self.tasks[task].metric == "perplexity":
                    raise ValueError(f"rows.{label}: a router answers prompts; the perplexity of {task} has no prompt")
        clash = set(self.adapters) & set(self.models)
        if clash:
            raise ValueError(f"{', '.join(sorted(clash))}: both an adapter and a model")
        return self
