"""Open the models of a merge: full checkpoints and LoRA folders in any mix, as weights or as deltas from the base."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from toolkit.checkpoints.adapters import Adapter, open_adapter
from toolkit.checkpoints.compressed import Compressed, on_base, open_change, split_task
from toolkit.checkpoints.deltas import AdapterDelta, Delta, DenseDelta
from toolkit.checkpoints.layout import is_head
from toolkit.checkpoints.reader import Checkpoint, FolderCheckpoint, open_checkpoint
from toolkit.checkpoints.released import by_released_names, with_prefix
from toolkit.errors import Problem, SpecError, ToolkitError
from toolkit.merge.groups import Group, Slot
from toolkit.merge.method import Method
from toolkit.merge.spec import MergeSpec


@dataclass(frozen=True)
class Input:
    """One opened model.

    Attributes:
        slot: where the spec names it.
        weights: its full weights.
        delta: its change from the group's base; `None` where there is no base.
        mapped: tensors whose rows were moved to another vocabulary, of which `delta` knows nothing.
    """

    slot: Slot
    weights: Checkpoint
    delta: Delta | None
    mapped: frozenset[str] = frozenset()

    @property
    def adapter(self) -> Adapter | None:
        """The LoRA folder, if the input is one on the group's base."""
        return self.delta.adapter if isinstance(self.delta, AdapterDelta) else None


@dataclass(frozen=True)
class GroupInputs:
    """The opened models of a group.

    Attributes:
        group: of the spec.
        base: what deltas are taken from, or `None`.
        models: the inputs that take part, in order.
    """

    group: Group
    base: Checkpoint | None
    models: list[Input]

    @property
    def donor(self) -> Checkpoint:
        """Whose tensors the output follows: the base, else the first model."""
        return self.base or self.models[0].weights


@dataclass(frozen=True)
class Inputs:
    """Everything a merge reads."""

    groups: list[GroupInputs]

    @property
    def base(self) -> Checkpoint | None:
        """The first group's base."""
        return self.groups[0].base

    @property
    def models(self) -> list[Input]:
        """All inputs, in the order of the spec."""
        return [model for group in self.groups for model in group.models]

    @property
    def donor(self) -> Checkpoint:
        """Whose config and tokenizer the output has: the first group's donor."""
        return self.groups[0].donor

    @property
    def checkpoints(self) -> list[Checkpoint]:
        """Everything that weights are read from."""
        return [model.weights for model in self.models] + [group.base for group in self.groups if group.base]

    def files(self) -> set[Path]:
        """Return the files of all inputs."""
        return set().union(*(checkpoint.files() for checkpoint in self.checkpoints))

    def close(self) -> None:
        """Close all files."""
        for checkpoint in self.checkpoints:
            checkpoint.close()


OpenMerge = Callable[[MergeSpec, str], Checkpoint]
"""Opens a merge inside a merge, given its spec and key path."""


def open_inputs(
    groups: Sequence[Group], method: Method, open_merge: OpenMerge, *, allow_pickle: bool = False
) -> tuple[Inputs, list[Problem]]:
    """Open every model of a spec, gathering what is wrong with each."""
    opener = _Opener(open_merge, allow_pickle)
    inputs = Inputs([opener.open_group(group, method) for group in groups])
    return _by_common_names(inputs), opener.problems


def _by_common_names(inputs: Inputs) -> Inputs:
    """Where full models name their tensors differently, read those that transformers has renamed by the old names."""
    plain = {id(c): c for c in inputs.checkpoints if isinstance(c, FolderCheckpoint)}
    names = {frozenset(c.tensors) for c in plain.values()}
    # A head that only some store is no other naming.
    if len({frozenset(n for n in own if not is_head(n)) for own in names}) < 2:
        return inputs
    longest = max(names, key=lambda own: max(map(len, own)))
    views: dict[int, Checkpoint] = {key: with_prefix(checkpoint, longest) for key, checkpoint in plain.items()}
    if views == plain:
        views = {key: by_released_names(checkpoint) or checkpoint for key, checkpoint in plain.items()}
    groups = []
    for group in inputs.groups:
        base = views.get(id(group.base), group.base) if group.base else None
        models = [_viewed(model, base, views) for model in group.models]
        groups.append(replace(group, base=base, models=models))
    return Inputs(groups)


def _viewed(model: Input, base: Checkpoint | None, views: Mapping[int, Checkpoint]) -> Input:
    weights = views.get(id(model.weights), model.weights)
    if isinstance(model.delta, DenseDelta):
        return replace(model, weights=weights, delta=DenseDelta(base, weights) if base else None)
    return replace(model, weights=weights)


class _Opener:
    """Opens models, each once."""

    def __init__(self, open_merge: OpenMerge, allow_pickle: bool) -> None:
        self.open_merge, self.allow_pickle = open_merge, allow_pickle
        self.problems: list[Problem] = []
        self.opened: dict[object, Checkpoint | None] = {}
        self.merges: list[tuple[MergeSpec, Checkpoint | None]] = []

    def open_group(self, group: Group, method: Method) -> GroupInputs:
        before = len(self.problems)
        base = None if group.base_model is None else self._checkpoint(group.base_model, "base_model")
        base_fails = group.base_model is not None and base is None
        base = self._named_as_adapted(base, group) if base else None
        models: list[Input] = []
        for slot in group.slots:
            found, base = self._open(slot, base, base_fails)
            models += [found] if found else []
        if method.takes_deltas(base is not None):
            # As in mergekit: the base among the models is a delta of zero and takes no part.
            models = [m for m in models if m.slot.model != group.base_model]
        if method.needs_base and base is None and len(self.problems) == before:
            self._add(Problem("base_model", f"required by {method.name}"))
        if base is not None and _takes_part(group, method, len(models)):
            models.insert(0, Input(Slot("base_model", group.base_model, {}, models[0].slot.layers), base, None))
        if method.base_first:
            models.sort(key=lambda m: m.slot.model != group.base_model)
        low, high = method.models
        if len(self.problems) == before and not low <= len(models) <= (high or len(models)):
            wanted = f"exactly {low}" if low == high else f"at least {low}"
            wanted = f"{low} to {high}" if high and low != high else wanted
            self._add(Problem(group.path, f"{method.name} takes {wanted}, got {len(models)}"))
        return GroupInputs(group, base, models)

    def _named_as_adapted(self, base: Checkpoint, group: Group) -> Checkpoint:
        """Return the base by the names that its adapters use."""
        for slot in group.slots:
            try:
                base_name, change = change_of(slot.model)
            except ToolkitError:
                continue  # which is reported when the slot is opened
            if isinstance(change, Adapter):
                change.close()
                if base_name in (None, group.base_model):
                    base = with_prefix(base, change.touched)
        if isinstance(group.base_model, str):
            self.opened[group.base_model] = base
        return base

    def _add(self, problem: Problem) -> None:
        if problem not in self.problems:
            self.problems.append(problem)

    def _checkpoint(self, source: object, where: str) -> Checkpoint | None:
        if isinstance(source, MergeSpec):
            return self._merge(source, where)
        key = source if isinstance(source, str) else id(source)
        if key not in self.opened:
            try:
                self.opened[key] = open_checkpoint(source, allow_pickle=self.allow_pickle)
            except ToolkitError as error:
                self.opened[key] = None
                self._add(Problem(where, str(error)))
        return self.opened[key]

    def _merge(self, spec: MergeSpec, where: str) -> Checkpoint | None:
        same = [opened for known, opened in self.merges if known == spec]
        if same:
            return same[0]
        opened = None
        try:
            opened = self.open_merge(spec, where)
        except SpecError as error:
            for problem in error.problems:
                self._add(Problem(f"{where}.{problem.where}", problem.message))
        self.merges.append((spec, opened))
        return opened

    def _open(self, slot: Slot, base: Checkpoint | None, base_fails: bool) -> tuple[Input | None, Checkpoint | None]:
        """Open a slot's model; an adapter without a base of the spec's brings its own."""
        where = f"{slot.path}.model"
        try:
            base_name, change = change_of(slot.model)
            if change is None:
                weights = self._checkpoint(slot.model, where)
                if weights is None:
                    return None, base
                return Input(slot, weights, DenseDelta(base, weights) if base else None), base
            own = self._checkpoint(base_name, where) if base_name is not None else base
            if own is None and base_name is None and not base_fails:
                if not change.base_model:
                    self._add(Problem("base_model", f"required: {change.source} is a change of a base and names none"))
                    return None, base
                own = base = self._checkpoint(change.base_model, where)
            if own is None:
                return None, base
            if isinstance(change, Adapter) and own is not base:
                own = with_prefix(own, change.touched)
            adapted = on_base(own, change)
        except ToolkitError as error:
            self._add(Problem(where, str(error)))
            return None, base
        if own is base:
            return Input(slot, adapted, adapted.delta), base
        return Input(slot, adapted, DenseDelta(base, adapted) if base else None), base


def _takes_part(group: Group, method: Method, count: int) -> bool:
    """Tell whether the base is one of the models although `count` others, and not the base, are listed."""
    if not count or any(slot.model == group.base_model for slot in group.slots):
        return False
    if method.base_first:
        return count < method.models[0]
    given = {key for _, values in group.shared for key in values}
    return method.base_joins and not group.is_slice and method.required_per_model <= given


def unnamed_base(spec: MergeSpec) -> list[Problem]:
    """Refuse a base that is a merge, where the output is a change that must name its base."""
    message = "is a merge, and a change of it could not name it; write it out first"
    return [Problem("base_model", message)] if isinstance(spec.base_model, MergeSpec) else []


def change_of(source: object) -> tuple[str | None, Adapter | Compressed | None]:
    """Split `base+change`; recognise a folder that holds a change of a base; `(None, None)` for a full model."""
    if not isinstance(source, str):
        return None, None
    if "+" in source and not Path(source).expanduser().exists():
        base, _, change = source.partition("+")
        return base, open_change(change) or open_adapter(change)
    exists = Path(split_task(source)[0]).expanduser().exists()
    return None, open_change(source) if exists or "/" in source else None
