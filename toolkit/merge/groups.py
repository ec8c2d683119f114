"""The models of a spec, in groups that are merged with each other: `models`, one slice, or one module."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from toolkit.merge.spec import InputSpec, MergeSpec, SliceSpec, SourceSpec

Block = tuple[str, Mapping[str, Any]]
"""Key path of a block of parameters, and the block."""


@dataclass(frozen=True)
class Slot:
    """One mention of a model in a spec.

    Attributes:
        path: key path, such as `slices[0].sources[1]`.
        model: what is named there.
        parameters: the block beside it.
        layers: first layer and the layer after the last, in a slice.
    """

    path: str
    model: Any
    parameters: Mapping[str, Any]
    layers: tuple[int, int] | None = None

    @property
    def block(self) -> Block:
        """Where its parameters are, and what they are."""
        return f"{self.path}.parameters", self.parameters


@dataclass(frozen=True)
class Group:
    """Models that are merged with each other.

    Attributes:
        path: key path of their list.
        slots: in order.
        base_model: what deltas are taken from.
        shared: blocks of parameters that hold for all of them, nearest first.
        module: first words of the tensors' names that the group makes; empty for all.
    """

    path: str
    slots: tuple[Slot, ...]
    base_model: Any
    shared: tuple[Block, ...]
    module: str = ""

    @property
    def is_slice(self) -> bool:
        """Whether the group makes a stretch of layers."""
        return self.slots[0].layers is not None

    def holds(self, name: str) -> bool:
        """Tell whether a tensor belongs to the group's module."""
        return not self.module or name == self.module or name.startswith(f"{self.module}.")


EVERYTHING = "default"
"""Name of the module that holds all tensors, as mergekit calls it."""


def groups_of(spec: MergeSpec, defaults: Mapping[str, Any] | None = None) -> list[Group]:
    """Return the groups of a spec, in the order in which their slices follow each other.

    Args:
        spec: of the merge.
        defaults: parameters that hold where the spec gives none.
    """
    shared: tuple[Block, ...] = (("parameters", spec.parameters), ("", defaults or {}))
    found = list(_groups(spec, spec.models, spec.slices, "", shared, ""))
    for name, module in (spec.modules or {}).items():
        path = f"modules.{name}."
        blocks = ((f"{path}parameters", module.parameters), *shared)
        prefix = "" if name == EVERYTHING else name
        found += _groups(spec, module.models, module.slices, path, blocks, prefix)
    return found


def _groups(
    spec: MergeSpec,
    models: Sequence[InputSpec] | None,
    slices: Sequence[SliceSpec] | None,
    path: str,
    shared: tuple[Block, ...],
    module: str,
) -> Iterator[Group]:
    if models:
        where = f"{path}models"
        yield Group(where, _slots(where, models), spec.base_model, shared, module)
    for i, part in enumerate(slices or ()):
        where = f"{path}slices[{i}]"
        base = spec.base_model if part.base_model is None else part.base_model
        blocks = ((f"{where}.parameters", part.parameters), *shared)
        yield Group(f"{where}.sources", _slots(f"{where}.sources", part.sources), base, blocks, module)


def _slots(path: str, models: Sequence[InputSpec]) -> tuple[Slot, ...]:
    return tuple(
        Slot(f"{path}[{i}]", m.model, m.parameters, m.layer_range if isinstance(m, SourceSpec) else None)
        for i, m in enumerate(models)
    )
