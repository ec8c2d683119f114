"""What a merge method is, and how its file declares it.

A method is one module in `toolkit/merge/methods`. It declares

- `TAKES`: `"weights"`, or `"deltas"` from the base;
- `MODELS`: smallest and largest number of inputs;
- `class Params(MethodParams)`: its parameters for one tensor; a `tuple` field has one value per model;
- `combine(x, params, state, start) -> y`: one chunk, `x` `[M, N]` float32 (its own to overwrite) -> `[N]`;
- at will, `prepare(tensor, params) -> state`: what must be known of the whole tensor first, read as a stream;
- at will, `coefficients(params) -> [M]`: when the merged delta is `sum_i c_i * delta_i`, which lets several LoRAs
  become one exactly; `None` where the parameters do not allow it;
- at will, `idempotent(params) -> bool`: whether equal inputs give that input, true by default; tensors that no
  input changes are then copied;
- at will, `BASE_FIRST = True`: the base, where it is one of the models, is the first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, get_origin

from toolkit import names
from toolkit.checkpoints.dtypes import Floats
from toolkit.specs import Spec

METHODS = "toolkit.merge.methods"


class MethodParams(Spec):
    """The parameters of a method for one tensor; a default of length 1 in a tuple field holds for every model."""


class TensorStream(Protocol):
    """One tensor of every input, read chunk by chunk; the arrays are reused, so copy what must last.

    Attributes:
        count: elements of the tensor.
        num_models: inputs.
    """

    count: int
    num_models: int

    def of_model(self, index: int, every: int = 1) -> Iterator[tuple[int, Floats]]:
        """Yield `(start, [N])` for one input, its deltas or its weights, of each `every`-th chunk."""
        ...

    def stacked(self) -> Iterator[tuple[int, Floats]]:
        """Yield `(start, [M, N])` for all inputs."""
        ...


@dataclass(frozen=True)
class Method:
    """A loaded method; see the module's description for the fields."""

    name: str
    takes: Literal["weights", "deltas"]
    models: tuple[int, int | None]
    params: type[MethodParams]
    combine: Callable[[Floats, Any, Any, int], Floats]
    prepare: Callable[[TensorStream, Any], Any] | None
    coefficients: Callable[[Any], Sequence[float] | None]
    idempotent: Callable[[Any], bool]
    base_first: bool

    @property
    def needs_base(self) -> bool:
        """Whether `base_model` is required."""
        return self.takes == "deltas"

    def per_model(self) -> set[str]:
        """Name the parameters that have one value per model."""
        fields = self.params.model_fields.items()
        return {field.alias or name for name, field in fields if get_origin(field.annotation) is tuple}

    def shared(self) -> set[str]:
        """Name the parameters that have one value for all models."""
        return {field.alias or name for name, field in self.params.model_fields.items()} - self.per_model()


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
        getattr(module, "prepare", None),
        getattr(module, "coefficients", lambda params: None),
        getattr(module, "idempotent", lambda params: True),
        getattr(module, "BASE_FIRST", False),
    )
