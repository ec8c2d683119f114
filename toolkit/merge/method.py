"""What a merge method is, and how its file declares it.

A method is one module in `toolkit/merge/methods`. It declares

- `TAKES`: `"weights"`; `"deltas"` from the base; or `"either"`, deltas where the merge has a base, else weights;
- `MODELS`: smallest and largest number of inputs; where deltas are taken the base is not one of them;
- `class Params(MethodParams)`: its parameters for one tensor; a `tuple` field has one value per model;
- `combine(x, params, state, start) -> y`: float32 to float32, `x` its own to overwrite;
- at will, `SCOPE`: how much `combine` gets at a time. `"element"`, the default: any slice of the flattened tensor,
  `x` `[M, N]` to `y` `[N]`, `start` its first element. `"row"`: whole rows, `x` `[M, R, K]` to `y` `[R, K]`; a vector
  is one row. `"tensor"`: all of it, `x` `[M, *shape]` to `y` `[*shape]`;
- at will, `prepare(tensor, params) -> state`: what must be known of the whole tensor first, read as a stream;
- at will, `survey(tensors) -> states`: what must be known of the whole model first; takes `(tensor, params)` of every
  tensor that is merged, and returns for each what `tensor.surveyed` will be;
- at will, `coefficients(params, state) -> [M]`: when the merged delta is `sum_i c_i * delta_i`, which lets several
  LoRAs become one exactly; `None` where the parameters do not allow it;
- at will, `USES_ALL = True`: every element of every input goes into the result at any parameters, so that NaN and
  infinity show there; the inputs of other methods are looked through for them;
- at will, `idempotent(params) -> bool`: whether equal inputs give that input, true by default; tensors that no
  input changes are then copied;
- at will, `STATISTICS`: what is measured of every model on data first: `"fisher"`, `"gram"` (inner products of what
  enters linear layers) or `"merged_gram"` (the same above merged layers); they are `tensor.statistics`, `None` for
  tensors that have none;
- at will, `BASE_FIRST = True`: the base, where it is one of the models, is the first;
- at will, `BASE_JOINS = True`: a base that is not listed among the models is one of them all the same, as in mergekit,
  where `parameters` or defaults give it what a model needs;
- at will, `ON_DEVICE = False`: it does not run on a GPU, as no method of scope `"tensor"` does. All others get
  arrays there that take numpy's functions (`toolkit.merge.device`): what `combine` and `prepare` make anew, such as
  `np.zeros(n, np.float32, like=x)`, is to be `like` what they were given;
- at will, `memory(shape, models) -> int`: bytes that `prepare` and `combine` hold at most besides slices of `x` and
  `y`, or besides all of them for methods of scope `"tensor"`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Literal, Protocol, get_origin

from pydantic import model_validator

from toolkit import names
from toolkit.checkpoints.dtypes import Floats
from toolkit.merge.statistics.files import Statistics
from toolkit.specs import Spec

METHODS = "toolkit.merge.methods"

Scope = Literal["element", "row", "tensor"]


class MethodParams(Spec):
    """The parameters of a method for one tensor; a default of length 1 in a tuple field holds for every model.

    Where tools of the field compute the same method differently, each choice is a parameter of its own, and a field
    `preset` names a set of them: `PRESETS` gives the choices that the spec leaves open.
    """

    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {}

    @model_validator(mode="before")
    @classmethod
    def _fill_from_preset(cls, data: Any) -> Any:
        if not cls.PRESETS or not isinstance(data, Mapping):
            return data
        preset = data.get("preset", cls.model_fields["preset"].default)
        return {**cls.PRESETS.get(preset, {}), **data}


class TensorStream(Protocol):
    """One tensor of every input, read slice by slice; the arrays are reused, so copy what must last.

    Attributes:
        name: of the output tensor.
        shape: of the tensor.
        count: its elements.
        num_models: inputs.
        is_delta: whether deltas are read, not weights.
        surveyed: what the method's `survey` found for it.
        statistics: what was measured on data, for methods that declare it.
    """

    name: str
    shape: tuple[int, ...]
    count: int
    num_models: int
    is_delta: bool
    surveyed: Any
    statistics: Statistics | None

    def stacked(self, every: int = 1, begin: int = 0) -> Iterator[tuple[int, Floats]]:
        """Yield `(start, [M, N])` for all inputs, of each `every`-th slice from the one at `begin` on."""
        ...


@dataclass(frozen=True)
class Method:
    """A loaded method; see the module's description for the fields."""

    name: str
    takes: Literal["weights", "deltas", "either"]
    models: tuple[int, int | None]
    params: type[MethodParams]
    combine: Callable[[Floats, Any, Any, int], Floats]
    scope: Scope
    prepare: Callable[[TensorStream, Any], Any] | None
    survey: Callable[[Sequence[tuple[TensorStream, Any]]], Sequence[Any]] | None
    statistics: Literal["fisher", "gram", "merged_gram"] | None
    coefficients: Callable[[Any, Any], Sequence[float] | None]
    idempotent: Callable[[Any], bool]
    uses_all: bool
    base_first: bool
    base_joins: bool
    on_device: bool
    memory: Callable[[tuple[int, ...], int], int]

    @property
    def needs_base(self) -> bool:
        """Whether `base_model` is required."""
        return self.takes == "deltas"

    def takes_deltas(self, has_base: bool) -> bool:
        """Tell whether `combine` gets deltas in a merge with or without a base."""
        return self.takes == "deltas" or (self.takes == "either" and has_base)

    @cached_property
    def per_model(self) -> frozenset[str]:
        """Names of the parameters that have one value per model."""
        fields = self.params.model_fields.items()
        return frozenset(field.alias or name for name, field in fields if get_origin(field.annotation) is tuple)

    @cached_property
    def required_per_model(self) -> frozenset[str]:
        """Names of those that have no default."""
        fields = self.params.model_fields.items()
        return self.per_model & frozenset(field.alias or name for name, field in fields if field.is_required())

    @cached_property
    def shared(self) -> frozenset[str]:
        """Names of the parameters that have one value for all models."""
        return frozenset(field.alias or name for name, field in self.params.model_fields.items()) - self.per_model


def load_method(name: str) -> Method:
    """Load a method by the name of its file.

    Raises:
        UnsupportedError: no such method; suggests the nearest.
    """
    module = names.load(METHODS, name, "merge method")
    return Method(
        name,
        module.TAKES,
        module.MODELS,
        module.Params,
        module.combine,
        getattr(module, "SCOPE", "element"),
        getattr(module, "prepare", None),
        getattr(module, "survey", None),
        getattr(module, "STATISTICS", None),
        getattr(module, "coefficients", lambda params, state: None),
        getattr(module, "idempotent", lambda params: True),
        getattr(module, "USES_ALL", False),
        getattr(module, "BASE_FIRST", False),
        getattr(module, "BASE_JOINS", False),
        getattr(module, "ON_DEVICE", getattr(module, "SCOPE", "element") != "tensor"),
        getattr(module, "memory", lambda shape, models: 0),
    )
