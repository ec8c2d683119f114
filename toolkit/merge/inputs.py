"""Open the models of a merge: full checkpoints and LoRA folders in any mix, as weights or as deltas from the base."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from toolkit.checkpoints.adapters import Adapter, is_adapter, open_adapter
from toolkit.checkpoints.deltas import AdaptedCheckpoint, AdapterDelta, Delta, DenseDelta
from toolkit.checkpoints.locate import locate
from toolkit.checkpoints.reader import Checkpoint, open_checkpoint
from toolkit.errors import Problem, ToolkitError
from toolkit.merge.method import Method
from toolkit.merge.spec import MergeSpec


@dataclass(frozen=True)
class Input:
    """One opened model.

    Attributes:
        position: in the spec's `models`.
        weights: its full weights.
        delta: its change from the base; `None` where there is no base.
    """

    position: int
    weights: Checkpoint
    delta: Delta | None

    @property
    def adapter(self) -> Adapter | None:
        """The LoRA folder, if the input is one on the merge's base."""
        return self.delta.adapter if isinstance(self.delta, AdapterDelta) else None


@dataclass(frozen=True)
class Inputs:
    """Everything a merge reads.

    Attributes:
        base: opened base model, or `None`.
        models: the inputs that take part, in order.
    """

    base: Checkpoint | None
    models: list[Input]

    @property
    def donor(self) -> Checkpoint:
        """Whose tensors, config and tokenizer the output follows: the base, else the first model."""
        return self.base or self.models[0].weights

    def close(self) -> None:
        """Close all files."""
        for model in self.models:
            model.weights.close()
        if self.base:
            self.base.close()


def open_inputs(spec: MergeSpec, method: Method, *, allow_pickle: bool = False) -> tuple[Inputs, list[Problem]]:
    """Open every model of a spec, gathering what is wrong with each."""
    opener = _Opener(spec, allow_pickle)
    models = [found for i in range(len(spec.models)) if (found := opener.open(i))]
    if method.needs_base:
        # As in mergekit: the base among the models is a delta of zero and takes no part.
        models = [m for m in models if spec.models[m.position].model != spec.base_model]
        if opener.base is None and not opener.problems:
            opener.problems.append(Problem("base_model", f"required by {method.name}"))
    if method.base_first:
        models.sort(key=lambda m: spec.models[m.position].model != spec.base_model)
    low, high = method.models
    if not opener.problems and not low <= len(models) <= (high or len(models)):
        wanted = f"exactly {low}" if low == high else f"at least {low}"
        opener.problems.append(Problem("models", f"{method.name} takes {wanted}, got {len(models)}"))
    return Inputs(opener.base, models), opener.problems


class _Opener:
    def __init__(self, spec: MergeSpec, allow_pickle: bool) -> None:
        self.spec, self.allow_pickle = spec, allow_pickle
        self.problems: list[Problem] = []
        self.opened: dict[str, Checkpoint] = {}
        self.base: Checkpoint | None = None
        if spec.base_model is not None:
            self.base = self._checkpoint(spec.base_model, "base_model")

    def _checkpoint(self, source: object, where: str) -> Checkpoint | None:
        key = source if isinstance(source, str) else f"object {id(source)}"
        try:
            if key not in self.opened:
                self.opened[key] = open_checkpoint(source, allow_pickle=self.allow_pickle)
            return self.opened[key]
        except ToolkitError as error:
            self.problems.append(Problem(where, str(error)))
            return None

    def open(self, position: int) -> Input | None:
        where = f"models[{position}].model"
        source = self.spec.models[position].model
        try:
            base_name, adapter = _adapter_of(source)
        except ToolkitError as error:
            self.problems.append(Problem(where, str(error)))
            return None
        full = adapter is None
        weights = self._checkpoint(source, where) if full else self._adapted(base_name, adapter, where)
        if weights is None:
            return None
        if isinstance(weights, AdaptedCheckpoint) and weights.delta.base is self.base:
            return Input(position, weights, weights.delta)
        return Input(position, weights, DenseDelta(self.base, weights) if self.base else None)

    def _adapted(self, base_name: str | None, adapter: Adapter, where: str) -> Checkpoint | None:
        base: Checkpoint | None
        if base_name is not None:
            base = self._checkpoint(base_name, where)
        elif self.base is not None:
            base = self.base
        elif self.spec.base_model is not None:
            return None  # the base could not be opened, which is a problem already
        elif adapter.base_model:
            base = self.base = self._checkpoint(adapter.base_model, where)
        else:
            self.problems.append(Problem("base_model", f"required: {adapter.source} is an adapter and names no base"))
            return None
        if base is None:
            return None
        try:
            return AdaptedCheckpoint(AdapterDelta(base, adapter))
        except ToolkitError as error:
            self.problems.append(Problem(where, str(error)))
            return None


def _adapter_of(source: object) -> tuple[str | None, Adapter | None]:
    """Split `base+adapter`; recognise an adapter folder; `(None, None)` for a full model."""
    if not isinstance(source, str):
        return None, None
    if "+" in source and not Path(source).exists():
        base, _, adapter = source.partition("+")
        return base, open_adapter(adapter)
    path = Path(source).expanduser()
    if not path.exists() and "/" in source:
        path = locate(source)
    return None, open_adapter(source) if path.is_dir() and is_adapter(path) else None
