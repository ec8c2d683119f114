"""Align the models of a merge to one of them before they are merged."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from typing_extensions import override

from toolkit.checkpoints.deltas import DenseDelta
from toolkit.checkpoints.dtypes import Bytes, Floats
from toolkit.checkpoints.headers import TensorInfo
from toolkit.checkpoints.reader import Checkpoint
from toolkit.checkpoints.view import CheckpointView
from toolkit.errors import Problem, ToolkitError
from toolkit.merge.align.weight_matching import align, common_symmetry
from toolkit.merge.inputs import GroupInputs, Input, Inputs
from toolkit.merge.spec import AlignSpec, MergeSpec


class AlignedCheckpoint(CheckpointView):
    """A model that is aligned to a reference when something of it is read for the first time."""

    def __init__(self, reference: Checkpoint, inner: Checkpoint, settings: AlignSpec) -> None:
        super().__init__(inner)
        self.reference, self.settings = reference, settings
        self._lock = threading.Lock()
        self._view: Checkpoint | None = None

    def _aligned(self) -> Checkpoint:
        with self._lock:
            if self._view is None:
                options = self.settings.model_dump()
                self._view = align(self.reference, self.inner, **options).view
            return self._view

    @override
    def is_stored(self, name: str) -> bool:
        return False

    @override
    def read_raw(self, name: str, start: int = 0, stop: int | None = None) -> Bytes:
        return self._aligned().read_raw(name, start, stop)

    @override
    def read(self, name: str, start: int, stop: int, out: Floats) -> None:
        self._aligned().read(name, start, stop, out)

    @override
    def files(self) -> set[Path]:
        return self.inner.files() | self.reference.files()

    @property
    @override
    def buffer_bytes(self) -> int:
        return self.inner.buffer_bytes + _matching_bytes(self.tensors)


def _matching_bytes(tensors: Mapping[str, TensorInfo]) -> int:
    """Bound what weight matching allocates: two matrices, and inner products of an MLP's units in float64."""
    largest = max((t.count for t in tensors.values() if ".layers." in t.name or ".h." in t.name), default=0)
    units = max((t.shape[0] for t in tensors.values() if "mlp" in t.name and t.shape), default=0)
    return 2 * 4 * largest + 4 * 8 * units**2


def aligned(spec: MergeSpec, inputs: Inputs) -> tuple[Inputs, list[Problem]]:
    """Align every model to the base, or else to the first; also return what stands against it.

    A model that is a change of the base, such as a LoRA, sits where the base does and stays as it is.
    """
    if spec.align is None:
        return inputs, []
    if spec.models is None:
        return inputs, [Problem("align", "models are aligned as a whole; give models, not slices or modules")]
    (group,) = inputs.groups
    found: list[Problem] = []
    models = [_aligned(model, group, spec.align, found) for model in group.models]
    return Inputs([replace(group, models=models)]), found


def _aligned(model: Input, group: GroupInputs, settings: AlignSpec, found: list[Problem]) -> Input:
    reference = group.donor
    if model.weights is reference or (model.delta and not isinstance(model.delta, DenseDelta)):
        return model
    try:
        common_symmetry(reference, model.weights)
    except ToolkitError as error:
        found.append(Problem(f"{model.slot.path}.model", str(error)))
        return model
    weights = AlignedCheckpoint(reference, model.weights, settings)
    return replace(model, weights=weights, delta=DenseDelta(group.base, weights) if group.base else None)
