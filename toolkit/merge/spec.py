"""The merge spec: a superset of the YAML that mergekit users write."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, PlainSerializer, field_validator, model_validator

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


def _none_is_empty(value: Any) -> Any:
    return {} if value is None else value


Parameters = Annotated[dict[str, Any], BeforeValidator(_none_is_empty)]
"""Values of a method's parameters: a number, a list of anchors over the layers, or a list of `{filter, value}`."""


class InputSpec(Spec):
    """One model of a merge.

    Attributes:
        model: a full checkpoint or a PEFT LoRA folder.
        parameters: the method's parameters for this model.
    """

    model: Model
    parameters: Parameters = Field(default_factory=dict)


class SourceSpec(InputSpec):
    """One model of a slice.

    Attributes:
        layer_range: first layer, and the layer after the last.
    """

    layer_range: tuple[Annotated[int, Field(ge=0)], int]

    @field_validator("layer_range")
    @classmethod
    def _not_empty(cls, value: tuple[int, int]) -> tuple[int, int]:
        if value[1] <= value[0]:
            raise ValueError(f"the range {list(value)} holds no layer")
        return value


class SliceSpec(Spec):
    """Neighbouring layers of the output.

    Attributes:
        sources: whose layers are merged into them; ranges of the same length.
        base_model: instead of the merge's.
        parameters: the method's parameters in this slice; a source's own take precedence.
    """

    sources: Annotated[list[SourceSpec], Field(min_length=1)]
    base_model: Model | None = None
    parameters: Parameters = Field(default_factory=dict)


class ModuleSpec(Spec):
    """One part of a model that has several, such as a vision tower.

    Attributes:
        models: inputs that are merged in it.
        slices: or the slices that it is put together from.
        parameters: the method's parameters in this part.
    """

    models: list[InputSpec] | None = None
    slices: list[SliceSpec] | None = None
    parameters: Parameters = Field(default_factory=dict)

    @model_validator(mode="after")
    def _one_form(self) -> ModuleSpec:
        if (self.models is None) == (self.slices is None):
            raise ValueError("give either models or slices")
        return self


class TokenRow(Spec):
    """A row of a model's embeddings.

    Attributes:
        kind: `model_token`; or `zero`, and nothing else, for a row of zeros.
        model: whose row.
        token: which, by its text; or
        token_id: by its number.
    """

    kind: Literal["model_token", "zero"]
    model: Model | None = None
    token: str | None = None
    token_id: Annotated[int, Field(ge=0)] | None = None

    @model_validator(mode="after")
    def _complete(self) -> TokenRow:
        if self.kind == "zero" and (self.model, self.token, self.token_id) != (None, None, None):
            raise ValueError("a row of zeros is of no model")
        if self.kind == "model_token" and (self.model is None or (self.token is None) == (self.token_id is None)):
            raise ValueError("a model_token names its model, and either token or token_id")
        return self


class TokenSpec(Spec):
    """Where the embedding of one token comes from.

    Attributes:
        source: a model that has the token, or another row; used for models that lack the token.
        force: use it for the others as well.
    """

    source: TokenRow | Model | None = None
    force: bool = False


class TokenizerSpec(Spec):
    """The tokenizer of the output.

    Attributes:
        source: `union` of all models' tokens, `base` for that of the base (else the first model), or a model.
        tokens: where the embeddings of single tokens come from; a token that no model has is added.
        pad_to_multiple_of: rows of the embeddings are filled up to a multiple of this.
    """

    source: str = "union"
    tokens: dict[str, TokenSpec] = Field(default_factory=dict)
    pad_to_multiple_of: Annotated[int, Field(ge=1)] | None = None

    @field_validator("tokens", mode="before")
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
        models: inputs, in the order that every sum follows; or instead
        slices: layers of the output, one stretch after another, as for models of other depths ("frankenmerges"); or
        modules: a merge for each part of a model, by the first words of its tensors' names.
        base_model: what deltas are taken from; donor of config and tokenizer.
        parameters: the method's parameters; a model's own take precedence. A value is a number, a list of
            anchors spread over the layers, or a list of `{filter, value}`.
        dtype: dtype of the output, when `out_dtype` is not given. All arithmetic is float32.
        out_dtype: dtype of the output; by default each tensor keeps the donor's.
        tokenizer: of the output, where the models' vocabularies differ or tokens are added; embeddings and heads are
            then merged token by token. By default it is the donor's, and vocabularies must be the same.
        tokenizer_source: what mergekit's older specs call the tokenizer's source.
        chat_template: of the output: a template, the name of one (`chatml`, ...), or `auto` for the one that most
            models have; by default the donor's.
        output: what to write.
    """

    merge_method: str
    models: Annotated[list[InputSpec], Field(min_length=1)] | None = None
    slices: Annotated[list[SliceSpec], Field(min_length=1)] | None = None
    modules: Annotated[dict[str, ModuleSpec], Field(min_length=1)] | None = None
    base_model: Model | None = None
    parameters: Parameters = Field(default_factory=dict)
    dtype: str | None = None
    out_dtype: str | None = None
    tokenizer: TokenizerSpec | None = None
    tokenizer_source: str | None = None
    chat_template: str | None = None
    output: OutputSpec = OutputSpec()

    @property
    def wanted_tokenizer(self) -> TokenizerSpec | None:
        """The tokenizer block, or what the older key `tokenizer_source` means."""
        return TokenizerSpec(source=self.tokenizer_source) if self.tokenizer_source else self.tokenizer

    @model_validator(mode="after")
    def _one_form(self) -> MergeSpec:
        if self.tokenizer and self.tokenizer_source:
            raise ValueError("give either tokenizer or tokenizer_source")
        given = [key for key in ("models", "slices", "modules") if getattr(self, key) is not None]
        if len(given) != 1:
            raise ValueError(f"give one of models, slices and modules, got {' and '.join(given) or 'none'}")
        return self
