"""What the tests of merge methods share: tensors in memory, and the example that each method's test declares."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from toolkit.checkpoints.deltas import chunks
from toolkit.merge.method import MethodParams, load_method

WEIGHTS = (0.5, 0.3, 0.2)


@dataclass(frozen=True)
class Example:
    """How the laws run a method; every test of a method declares one as `EXAMPLE`.

    Attributes:
        params: for `models` inputs; a tuple has one value per model.
        models: inputs.
        neutral: parameters under which equal inputs give that input, `None` where none do.
        symmetric: the order of the inputs does not matter (their parameters turned with them).
        turned: the parameters for the inputs in reverse order, where reversing tuples is not enough.
        homogeneous: scaling all inputs scales the result.
        rtol: of comparisons, relative to the largest value.
    """

    params: Mapping[str, Any] = field(default_factory=dict)
    models: int = 3
    neutral: Mapping[str, Any] | None = None
    symmetric: bool = True
    turned: Mapping[str, Any] | None = None
    homogeneous: bool = True
    rtol: float = 1e-5


class Arrays:
    """A tensor of several models in memory as a `TensorStream`; the arrays it yields are its own.

    Args:
        x: `[M, *shape]`.
        scope: of the method; rows are not cut where it is `row`.
        name: of the tensor.
        surveyed: what the method's survey found.
    """

    def __init__(self, x: np.ndarray, scope: str = "element", name: str = "layer.weight", surveyed: Any = None) -> None:
        self.x = np.ascontiguousarray(x, np.float32)
        self.name, self.shape, self.scope, self.surveyed = name, x.shape[1:], scope, surveyed
        self.num_models, self.count = x.shape[0], int(np.prod(self.shape))
        self.is_delta = True
        self.statistics = None

    def stacked(self, every: int = 1, begin: int = 0) -> Iterator[tuple[int, np.ndarray]]:
        ranges = [r for r in chunks(self.shape, whole_rows=self.scope == "row") if r[1] > begin]
        for start, stop in ranges[::every]:
            yield start, self.x.reshape(self.num_models, -1)[:, start:stop].copy()


def settings(method: str, params: Mapping[str, Any], models: int) -> MethodParams:
    """Validate parameters as the resolver does: tuples have one value per model."""
    loaded = load_method(method)
    given = dict(params)
    for name, info in loaded.params.model_fields.items():
        key = info.alias or name
        if key in loaded.per_model:
            value = given.get(key, info.default)
            given[key] = tuple(value) * models if len(value) == 1 else tuple(value)
    return loaded.params.model_validate(given)


def run(method: str, x: np.ndarray, name: str = "layer.weight", **params: Any) -> np.ndarray:
    """Merge `x` `[M, *shape]`, taken as weights or as deltas, whichever the method takes; returns `[*shape]`."""
    loaded = load_method(method)
    given = settings(method, params, len(x))
    tensor = Arrays(x, loaded.scope, name)
    tensor.statistics = statistics_of(loaded.statistics, tensor.x)
    if loaded.survey:
        tensor.surveyed = loaded.survey([(tensor, given)])[0]
    state = loaded.prepare(tensor, given) if loaded.prepare else None
    if loaded.scope == "tensor":
        return loaded.combine(tensor.x.copy(), given, state, 0)
    width = x.shape[-1] if x.ndim > 1 else 1
    parts: list[np.ndarray] = []
    for start, chunk in tensor.stacked():
        shaped = chunk.reshape(len(x), -1, width) if loaded.scope == "row" else chunk
        parts.append(loaded.combine(shaped, given, state, start).reshape(-1).copy())
    return np.concatenate(parts).reshape(x.shape[1:])


class Measured:
    """Statistics in memory, `[M, *shape]`."""

    transposed = False

    def __init__(self, values: np.ndarray) -> None:
        self.values = values.astype(np.float32)

    def read(self, start: int, stop: int) -> np.ndarray:
        return self.values.reshape(len(self.values), -1)[:, start:stop].copy()

    def whole(self) -> np.ndarray:
        return self.values.copy()


def statistics_of(kind: str | None, x: np.ndarray) -> Measured | None:
    """Make up what data might say, from the models themselves, so that it goes with them."""
    if kind == "fisher":
        return Measured(np.square(x.astype(np.float64) / np.abs(x).max(initial=1e-30)))
    if kind is not None and x.ndim == 3:
        wide = x.astype(np.float64) / np.abs(x).max(initial=1e-30)
        return Measured(wide.transpose(0, 2, 1) @ wide)
    return None


def reversed_params(params: Mapping[str, Any]) -> dict[str, Any]:
    """Turn every value per model around."""
    return {k: v[::-1] if isinstance(v, Sequence) and not isinstance(v, str) else v for k, v in params.items()}


def run_mergekit(spec: Mapping[str, Any], out: Path) -> Path:
    """Run a spec through mergekit itself."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from mergekit.config import MergeConfiguration
        from mergekit.merge import run_merge
        from mergekit.options import MergeOptions

        run_merge(MergeConfiguration.model_validate(spec), str(out), MergeOptions(quiet=True, write_model_card=False))
    return out
