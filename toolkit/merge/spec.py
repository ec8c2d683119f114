"""The merge spec: a superset of the YAML that mergekit users write."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, PlainSerializer, Tag, field_validator, model_validator
from typing_extensions import override

from toolkit.errors import Problem, SpecError
from toolkit.specs import Document, Files, Size, Spec, path_text


def _loose(value: Any) -> Any:
    if isinstance(value, Mapping) and "model" in value:
        return _reference(value)
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, str) or hasattr(value, "state_dict"):
        return value
    raise ValueError("a model is a path, a hub id, a transformers model, or a merge of its own")


def _reference(value: Mapping[str, Any]) -> str:
    """Write `base@revision+lora` of what mergekit lets users spell out by `model`, `lora`, `path` and `revision`."""
    unknown = [key for key in value if key not in ("model", "lora")]
    if unknown:
        raise ValueError(f"{unknown[0]!r} is not supported beside model and lora")
    return "+".join(_path(value[key]) for key in ("model", "lora") if value.get(key) is not None)


def _path(value: Any) -> str:
    if isinstance(value, Mapping) and isinstance(value.get("path"), str) and value.keys() <= {"path", "revision"}:
        return f"{value['path']}@{value['revision']}" if value.get("revision") else value["path"]
    if not isinstance(value, str):
        raise ValueError(f"expected a path, or path and revision, got {value!r}")
    return value


def _is_merge(value: Any) -> bool:
    is_mapping = isinstance(value, Mapping)
    return isinstance(value, MergeSpec) or (is_mapping and ("merge_method" in value or "model" not in value))


PlainModel = Annotated[
    Any, BeforeValidator(_loose), PlainSerializer(lambda m: m if isinstance(m, str) else type(m).__name__)
]
"""A folder, a hub id, `base+adapter`, `FOLDER#TASK` of compressed deltas, or a transformers model in memory."""

Model = Annotated[
    Annotated["MergeSpec", Tag("merge")] | Annotated[PlainModel, Tag("model")],
    Discriminator(lambda value: "merge" if _is_merge(value) else "model"),
]
"""One of them, or a merge, which is computed as it is read."""


def _none_is_empty(value: Any) -> Any:
    return {} if value is None else value


Parameters = Annotated[dict[str, Any], BeforeValidator(_none_is_empty)]
"""Values of a method's parameters: a number, a list of anchors over the layers, or a list of `{filter, value}`."""


class InputSpec(Spec):
    """One model of a merge.

    Attributes:
        model: a full checkpoint or a PEFT LoRA folder.
        parameters: the method's parameters for this model.
        data: JSONL files of its own task, for methods that measure models on data.
    """

    model: Model
    parameters: Parameters = Field(default_factory=dict)
    data: Files | None = None


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

    models: Annotated[list[InputSpec], Field(min_length=1)] | None = None
    slices: Annotated[list[SliceSpec], Field(min_length=1)] | None = None
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
    model: PlainModel | None = None
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

    source: TokenRow | PlainModel | None = None
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
        type: `checkpoint`; `adapter` for one LoRA folder (every input a LoRA of the base); or `compressed` for a small
            change of the base, as `toolkit extract` makes it.
        kind: `as` in a spec; of `compressed`: `bit`, `svd` or `lora`.
        rank: of a LoRA, or of a compressed change's pairs. Of an `adapter` by default the sum of the inputs' ranks,
            which is exact for methods that add deltas; `full` keeps every singular value.
        energy: of `compressed`: instead of a rank, the share of each change's squared norm that is kept.
        budget: of `compressed`: instead, bytes of all that is written, such as `20MB`.
        scale: of `compressed` as `bit`: one per `row` or one per `tensor`.
    """

    type: Literal["checkpoint", "adapter", "compressed"] = "checkpoint"
    kind: Literal["bit", "svd", "lora"] = Field(default="bit", alias="as")
    rank: int | Literal["full"] | None = None
    energy: float | None = None
    budget: Size | None = None
    scale: Literal["row", "tensor"] = "row"

    @field_validator("rank")
    @classmethod
    def _positive(cls, value: int | str | None) -> int | str | None:
        if isinstance(value, int) and value < 1:
            raise ValueError("a rank is at least 1")
        return value

    @model_validator(mode="after")
    def _fitting(self) -> OutputSpec:
        own = {"kind", "energy", "budget", "scale"} & self.model_fields_set
        if self.type != "compressed" and own:
            key = sorted("as" if name == "kind" else name for name in own)[0]
            raise ValueError(f"{key} is an option of type compressed, not of {self.type}")
        return self


class DataSpec(Spec):
    """How models are measured on data, by methods that do.

    Attributes:
        files: JSONL files for models that name none of their own.
        limit: most rows of each model, the first ones.
        max_length: most tokens of a row; the rest is cut off.
        labels: `data`, the rows' own answers; or `model`, answers drawn from the model's predictions, as in the
            definition of the Fisher information.
        seed: of what is drawn.
        device: to run the models on: `auto`, `cpu`, `cuda`, ...
    """

    files: Files | None = None
    limit: Annotated[int, Field(ge=1)] = 256
    max_length: Annotated[int, Field(ge=2)] = 512
    labels: Literal["data", "model"] = "data"
    seed: int = 0
    device: str = "auto"


class AlignSpec(Spec):
    """How the units of the models are permuted to sit where the base, or else the first model, has the same ones.

    Attributes:
        seed: of the order in which groups of units take turns.
        sweeps: most turns of all groups.
        residual: permute the residual stream too, and not only hidden units and heads.
    """

    seed: int = 0
    sweeps: Annotated[int, Field(ge=0)] = 50
    residual: bool = True


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
        seed: of methods that draw random numbers, where their parameters name none.
        dtype: dtype of the output, when `out_dtype` is not given. All arithmetic is float32.
        out_dtype: dtype of the output; by default each tensor keeps the donor's.
        tokenizer: of the output, where the models' vocabularies differ or tokens are added; embeddings and heads are
            then merged token by token. By default it is the donor's, and vocabularies must be the same.
        tokenizer_source: what mergekit's older specs call the tokenizer's source.
        chat_template: of the output: a template, the name of one (`chatml`, ...), or `auto` for the one that most
            models have; by default the donor's.
        data: what models are measured on, by methods that need it.
        align: permute the units of models that share no base before they are merged; `{}` for the usual way.
        output: what to write.
    """

    merge_method: str
    models: Annotated[list[InputSpec], Field(min_length=1)] | None = None
    slices: Annotated[list[SliceSpec], Field(min_length=1)] | None = None
    modules: Annotated[dict[str, ModuleSpec], Field(min_length=1)] | None = None
    base_model: Model | None = None
    parameters: Parameters = Field(default_factory=dict)
    seed: int | None = None
    dtype: str | None = None
    out_dtype: str | None = None
    tokenizer: TokenizerSpec | None = None
    tokenizer_source: str | None = None
    chat_template: str | None = None
    data: DataSpec | None = None
    align: AlignSpec | None = None
    output: OutputSpec = OutputSpec()

    @classmethod
    @override
    def join(cls, documents: Sequence[Document]) -> Document:
        """Put each named document in the place of its name in the later ones, as mergekit-multi does."""
        known: dict[str, Document] = {}
        unused: dict[str, int] = {}
        for data, lines in documents[:-1]:
            name = data.pop("name", None)
            if not isinstance(name, str) or not name:
                raise SpecError([Problem("name", "required in each document but the last", lines.get("", 1))])
            if name in known:
                raise SpecError([Problem("name", f"two documents are called {name!r}", lines["name"])])
            known[name] = _with_merges((data, lines), known, unused)
            unused[name] = lines["name"]
        last = _with_merges(documents[-1], known, unused)
        if unused:
            raise SpecError([Problem("name", f"no later document merges {n!r}", line) for n, line in unused.items()])
        return last

    @property
    def wanted_tokenizer(self) -> TokenizerSpec | None:
        """The tokenizer block, or what the older key `tokenizer_source` means."""
        return TokenizerSpec(source=self.tokenizer_source) if self.tokenizer_source else self.tokenizer

    @model_validator(mode="before")
    @classmethod
    def _not_to_be_searched(cls, data: Any) -> Any:
        if isinstance(data, Mapping) and "search" in data:
            raise ValueError("search: its coefficients are to be tuned first, by `toolkit search SPEC OUT`")
        return data

    @model_validator(mode="after")
    def _one_form(self) -> MergeSpec:
        if self.tokenizer and self.tokenizer_source:
            raise ValueError("give either tokenizer or tokenizer_source")
        given = [key for key in ("models", "slices", "modules") if getattr(self, key) is not None]
        if len(given) != 1:
            raise ValueError(f"give one of models, slices and modules, got {' and '.join(given) or 'none'}")
        return self


def _with_merges(document: Document, known: Mapping[str, Document], unused: dict[str, int]) -> Document:
    """Put merges in the place of their names wherever a document names a model; takes them out of `unused`."""
    data, lines = document[0], dict(document[1])

    def replaced(here: Any, trail: tuple[str | int, ...]) -> Any:
        if isinstance(here, dict):
            return {key: replaced(inner, (*trail, key)) for key, inner in here.items()}
        if isinstance(here, list):
            return [replaced(inner, (*trail, i)) for i, inner in enumerate(here)]
        if not trail or trail[-1] not in ("model", "base_model") or here not in known:
            return here
        unused.pop(here, None)
        merge, inside = known[here]
        lines.update({f"{path_text(trail)}.{where}": line for where, line in inside.items() if where})
        return merge

    return replaced(data, ()), lines


for _spec in (InputSpec, SourceSpec, SliceSpec, ModuleSpec, MergeSpec):
    _spec.model_rebuild()
