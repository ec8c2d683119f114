"""What is compared: methods, tasks and the budget that all of them get."""

from __future__ import annotations

from collections import Counter
from typing import Annotated, Any

from pydantic import Field, field_validator, model_validator

from toolkit.embedded.skills import SKILLS
from toolkit.names import did_you_mean
from toolkit.specs import Spec

Rates = Annotated[tuple[Annotated[float, Field(gt=0)], ...], Field(min_length=1)]
"""Learning rates at their peak."""


class Contender(Spec):
    """One row of the table.

    Attributes:
        name: in the table.
        group: rows of one group share a table; `equal memory`, say.
        adapter: the block of a training spec.
        training: what differs from the common `training` block.
        rates: to choose from, instead of the common ones.
        joint: train one adapter on all columns together, which the method may tell apart.
        sources: a method above, whose adapters for the skills of all other columns this one puts together.
    """

    name: str
    group: str = ""
    adapter: dict[str, Any]
    training: dict[str, Any] = Field(default_factory=dict)
    rates: Rates | None = None
    joint: bool = False
    sources: str | None = None


class CompareSpec(Spec):
    """A comparison.

    Attributes:
        base: a folder, a hub id, or `toolkit:base`.
        skills: of the embedded base, whose rows are generated.
        tasks: folders of real tasks, in the folder that the command line names.
        train: rows of each task to train on, at most.
        validation: rows by which a rate is chosen, at most.
        test: rows for the scores, at most.
        training: block of a training spec that all share; the budget is its `max_steps` and `batch_size`.
        rates: learning rates that each method is tried with; the one with the least loss on validation rows is taken.
        tuned_on: tasks and skills on which the rate is chosen, with the first seed.
        seeds: of the training; scores are means over them.
        methods: rows of the table.
    """

    base: str = "toolkit:base"
    skills: tuple[str, ...] = tuple(SKILLS)
    tasks: tuple[str, ...] = ()
    train: Annotated[int, Field(ge=1)] = 2000
    validation: Annotated[int, Field(ge=1)] = 100
    test: Annotated[int, Field(ge=1)] = 200
    training: dict[str, Any] = Field(default_factory=dict)
    rates: Rates = (0.005,)
    tuned_on: tuple[str, ...] = ()
    seeds: Annotated[tuple[int, ...], Field(min_length=1)] = (0,)
    methods: Annotated[tuple[Contender, ...], Field(min_length=1)]

    @field_validator("skills")
    @classmethod
    def _known(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        for name in names:
            if name not in SKILLS:
                raise ValueError(f"no skill {name!r}{did_you_mean(name, SKILLS)} (known: {', '.join(SKILLS)})")
        return names

    @model_validator(mode="after")
    def _consistent(self) -> CompareSpec:
        columns = [*self.skills, *self.tasks]
        if not columns:
            raise ValueError("expected a skill or a task")
        for name in self.tuned_on:
            if name not in columns:
                raise ValueError(f"tuned_on: no task {name!r}{did_you_mean(name, columns)}")
        for names in (columns, [method.name for method in self.methods]):
            twice = [name for name, count in Counter(names).items() if count > 1]
            if twice:
                raise ValueError(f"{twice[0]!r} stands twice")
        self._check_sources()
        if not self.tuned_on and any(len(method.rates or self.rates) > 1 for method in self.methods):
            raise ValueError("tuned_on: required, since there are several rates to choose from")
        return self

    def _check_sources(self) -> None:
        above: list[str] = []
        for method in self.methods:
            if method.sources is not None and method.sources not in above:
                raise ValueError(f"{method.name}: no method {method.sources!r} above it to take sources from")
            if method.sources is not None and (method.joint or len(self.skills) < 2):
                raise ValueError(f"{method.name}: sources need two skills, and a training for each column")
            if not method.joint and method.sources is None:
                above.append(method.name)
