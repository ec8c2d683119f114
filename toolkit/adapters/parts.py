"""The objective and the methods of a run, made from their names in a spec."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from toolkit import names, specs
from toolkit.adapters.objectives._base import Objective
from toolkit.adapters.spec import MethodSpec, TrainSpec
from toolkit.adapters.training._base import SLOTS, TrainingMethod
from toolkit.errors import Problem, UnsupportedError

OBJECTIVES = "toolkit.adapters.objectives"
TRAINING = "toolkit.adapters.training"


@dataclass(frozen=True)
class Parts:
    """What a run is made of besides its model and its data.

    Attributes:
        objective: what is learned from a row.
        methods: how it is trained, outermost first.
    """

    objective: Objective
    methods: tuple[TrainingMethod, ...] = ()

    def filling(self, hook: str) -> Any:
        """Return the method that fills a hook of which there is one, or `None`."""
        return next((m for m in self.methods if _overrides(m, hook)), None)

    @property
    def needs_tasks(self) -> bool:
        """Whether rows of different tasks must be told apart."""
        return any(method.needs_tasks for method in self.methods)

    @property
    def in_sequence(self) -> bool:
        """Whether tasks are trained one after another."""
        return any(method.in_sequence for method in self.methods)

    def record(self) -> dict[str, Any]:
        """Return what the record of a run says of its parts."""
        found = self.objective.record()
        for method in self.methods:
            found |= method.record()
        return found


def parts_of(spec: TrainSpec) -> Parts:
    """Make the parts of a run.

    Raises:
        SpecError: a name or a parameter that is not known, or parts that do not fit the run.
    """
    parts, found = _built(spec)
    if parts is None:
        raise spec.error(found)
    return parts


def part_faults(spec: TrainSpec) -> list[Problem]:
    """Return what is wrong with the objective and the methods of a spec."""
    parts, found = _built(spec)
    return found if parts is None else [*_clashes(spec, parts), *_own_faults(spec, parts)]


def _built(spec: TrainSpec) -> tuple[Parts | None, list[Problem]]:
    objective, found = _made(spec, spec.objective, "objective", Objective)
    methods = []
    for index, chosen in enumerate(spec.training.methods):
        where = f"training.methods[{index}]"
        method, wrong = _made(spec, chosen, where, TrainingMethod)
        methods.append(method)
        found += wrong
    return (None, found) if found else (Parts(objective, tuple(methods)), [])


def _made(spec: TrainSpec, chosen: MethodSpec, where: str, base: type) -> tuple[Any, list[Problem]]:
    """Make the one subclass of `base` in the file that a block of the spec names."""
    package, kind = (OBJECTIVES, "objective") if base is Objective else (TRAINING, "training method")
    try:
        module = names.load(package, chosen.method, kind)
    except UnsupportedError as error:
        return None, [Problem(f"{where}.method", str(error))]
    (made,) = (
        v
        for v in vars(module).values()
        if isinstance(v, type) and issubclass(v, base) and v.__module__ == module.__name__
    )
    try:
        return made(made.Params.model_validate(chosen.fields), spec), []
    except ValidationError as error:
        return None, specs.problems(error, chosen.fields, made.Params, {}, f"{where}.")


def _clashes(spec: TrainSpec, parts: Parts) -> Iterator[Problem]:
    """Say where two parts fill the same place."""
    for hook in SLOTS:
        filled = [i for i, method in enumerate(parts.methods) if _overrides(method, hook)]
        for index in filled[1:]:
            chosen = spec.training.methods
            both = f"{chosen[filled[0]].method} and {chosen[index].method}"
            yield Problem(
                f"training.methods[{index}]", f"{both} both set the {hook.replace('_', ' ')}; take one of them"
            )
    own = next((method for method in parts.methods if method.computes_gradients), None)
    for index, method in enumerate(parts.methods):
        if own is not None and method is not own and any(_overrides(method, hook) for hook in ("step", "loss")):
            both = f"{spec.training.methods[index].method} changes a loss"
            yield Problem(f"training.methods[{index}]", f"{both} that {own.name} computes by itself; take one of them")
    for hook, key in (("rate", "lr_scheduler"), ("optimizer", "optimizer")):
        if parts.filling(hook) is not None and key in spec.training.model_fields_set:
            yield Problem(f"training.{key}", "training.methods sets it already; leave one out")


def _own_faults(spec: TrainSpec, parts: Parts) -> Iterator[Problem]:
    yield from parts.objective.faults()
    for method in parts.methods:
        yield from method.faults()
    if spec.data.packing and not parts.objective.packs:
        yield Problem("data.packing", f"{spec.objective.method} learns from single rows; set it to false")
    if parts.needs_tasks:
        names_ = {source.task for source in spec.data.sources()}
        for index, source in enumerate(spec.data.sources()):
            if source.task is None:
                yield Problem(f"data.train[{index}].task", "required: a training method tells tasks apart")
        for index, source in enumerate(spec.data.sources(validation=True)):
            if source.task not in names_:
                known = ", ".join(sorted(name for name in names_ if name))
                yield Problem(f"data.validation[{index}].task", f"expected one of {known}")


def _overrides(method: TrainingMethod, hook: str) -> bool:
    return getattr(type(method), hook) is not getattr(TrainingMethod, hook)
