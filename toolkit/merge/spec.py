"""The merge spec: a superset of the YAML that mergekit users write."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, PlainSerializer, field_validator

from toolkit.specs import Spec


def _model(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, str) or hasattr(value, "state_dict"):
        return value
    raise ValueError("a model is a path, a hub id, or a transformers model")


Model = Annotated[
    Any, BeforeValidator(_model), PlainSerializer(lambda m: m if isinstance(m, str) else type(m).__name__)
]
"""A folder, a hub id, `base+adapter`, or a transformers model in memory."""


class InputSpec(Spec):
    """One model of a merge.

    Attributes:
        model: a full checkpoint or a PEFT LoRA folder.
        parameters: the method's parameters for this model.
    """

    model: Model
    parameters: dict[str, Any] = Field(default_factory=dict)

    @field_validator("parameters", mode="before")
    @classmethod
    def _none_is_empty(cls, value: Any) -> Any:
        return {} if value is None else value


class OutputSpec(Spec):
    """What a merge writes.

    Attributes:
        type: `checkpoint`, or `adapter` for one LoRA folder (every input a LoRA of the base).
        rank: of the LoRA; by default the sum of the inputs' ranks, which is exact for methods that add deltas;
            `full` keeps every singular value.
    """

    type: Literal["checkpoint", "adapter"] = "checkpoint"
    rank: int | Literal["full"] | None = None

    @field_validator("rank")
    @classmethod
    def _positive(cls, value: int | str | None) -> int | str | None:
        if isinstance(value, int) and value < 1:
            raise ValueError("a rank is at least 1")
        return value


class MergeSpec(Spec):
    """A merge.

    Attributes:
        merge_method: name of a file in `toolkit/merge/methods`.
        models: inputs, in the order that every sum follows.
        base_model: what deltas are taken from; donor of config and tokenizer.
        parameters: the method's parameters; a model's own take precedence. A value is a number, a list of
            anchors spread over the layers, or a list of `{filter, value}`.
        dtype: dtype of the output, when `out_dtype` is not given. All arithmetic is float32.
        out_dtype: dtype of the output; by default each tensor keeps the donor's.
        output: what to write.
    """

    merge_method: str
    models: Annotated[list[InputSpec], Field(min_length=1)]
    base_model: Model | None = None
    parameters: dict[str, Any] = Field(default_factory=dict)
    dtype: str | None = None
    out_dtype: str | None = None
    output: OutputSpec = OutputSpec()

    @field_validator("parameters", mode="before")
    @classmethod
    def _none_is_empty(cls, value: Any) -> Any:
        return {} if value is None else value
