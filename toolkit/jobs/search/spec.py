"""The search spec: a merge, which of its numbers are free, and the tasks that judge it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    Field,
    ModelWrapValidatorHandler,
    PrivateAttr,
    field_validator,
    model_validator,
)

from toolkit import specs
from toolkit.evaluation.spec import TaskSpec
from toolkit.merge.spec import MergeSpec
from toolkit.specs import Folder, Spec

WEIGHTS = "models[*].parameters.weight"
"""What is free where the spec does not say."""

ROWS = ("base", "untuned merge", "tuned merge")
"""Rows of the table besides the inputs."""

Number = Annotated[float, Field(allow_inf_nan=False)]


class FreeSpec(Spec):
    """Numbers of the merge that are free.

    Attributes:
        path: key path in the merge, such as `parameters.lambda` or `models[0].parameters.weight`; `[*]` is every
            index. Of a list of anchors, or of `{filter, value}`, every number is free.
        low: smallest value.
        high: largest value.
        log: search the logarithm, for values whose ratios count.
        points: of a grid, from `low` to `high`.
    """

    path: str
    low: Number = 0.0
    high: Number = 1.5
    log: bool = False
    points: Annotated[int, Field(ge=2)] = 5

    @model_validator(mode="after")
    def _ordered(self) -> FreeSpec:
        if self.low >= self.high:
            raise ValueError(f"low {self.low:g} is not below high {self.high:g}")
        if self.log and self.low <= 0:
            raise ValueError(f"log needs a low above 0, got {self.low:g}")
        return self


def _free(value: Any) -> Any:
    return [{"path": v} if isinstance(v, str) else v for v in value] if isinstance(value, list) else value


class OptionsSpec(Spec):
    """How a search goes.

    Attributes:
        parameters: what is free; a path stands for itself with the usual bounds. By default all models' weights.
        method: `cma` (CMA-ES), `grid` (every combination of `points`), or `random` (uniform).
        budget: most candidates that are measured, the merge as it was given among them; by default all of a grid,
            else 50.
        population: candidates of a generation of CMA-ES; by default 4 + 3 ln(number of free values).
        sigma: first standard deviation of CMA-ES, as a share of each value's range.
        seed: of `cma` and `random`.
    """

    parameters: Annotated[list[FreeSpec], BeforeValidator(_free)] = Field(default_factory=list)
    method: Literal["cma", "grid", "random"] = "cma"
    budget: Annotated[int, Field(ge=1)] | None = None
    population: Annotated[int, Field(ge=4)] | None = None
    sigma: Annotated[float, Field(gt=0, le=1)] = 0.25
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0

    @model_validator(mode="after")
    def _of_the_method(self) -> OptionsSpec:
        for key in ("population", "sigma"):
            if self.method != "cma" and key in self.model_fields_set:
                raise ValueError(f"{key} is an option of method cma, not of {self.method}")
        return self


def _tasks(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    return {name: {"data": v} if isinstance(v, str | Path | list) else v for name, v in value.items()}


Tasks = Annotated[dict[str, TaskSpec], BeforeValidator(_tasks)]
"""Tasks by name; a file name stands for a task's `data`."""


class SearchSpec(Spec):
    """A search for the coefficients of a merge.

    A merge spec to which `search` and `tasks` are added is one as well: its own keys are the `merge`.

    Attributes:
        merge: the merge to tune, as it stands the first candidate; a block, or a YAML file of it.
        base: with `models`, instead of `merge`: the base that they were tuned from.
        models: LoRAs or fine-tunes of the base by name, merged by `task_arithmetic` with weights that start at
            `1 / number of models`; into a LoRA where all of them are LoRAs, else into a checkpoint.
        search: what is free, and how it is searched.
        tasks: to tune on. The score of a candidate is the mean over these: percent of `exact_match`, and
            `100 / perplexity`, which is the probability of a right token, in percent.
        test: tasks of other data, for the table.
        holdout: instead of `test`: share of every task's rows that is kept out of the tuning, for the table.
        merged: also write the tuned merge itself.
        device: `auto`, `cpu`, `cuda`, ...
        trust_remote_code: run code that comes with the models.
        out: folder for the results.
    """

    merge: MergeSpec | None = None
    base: Folder | None = None
    models: dict[str, Folder] = Field(default_factory=dict)
    search: OptionsSpec = OptionsSpec()
    tasks: Annotated[dict[str, TaskSpec], Field(min_length=1), BeforeValidator(_tasks)]
    test: Tasks = Field(default_factory=dict)
    holdout: Annotated[float, Field(gt=0, lt=1)] | None = None
    merged: bool = True
    device: str = "auto"
    trust_remote_code: bool = False
    out: Folder | None = None

    _is_merge_spec: bool = PrivateAttr(False)

    @property
    def is_merge_spec(self) -> bool:
        """Whether the merge's keys stood beside the search's, and in no block of their own."""
        return self._is_merge_spec

    @model_validator(mode="wrap")
    @classmethod
    def _gather_merge(cls, data: Any, handler: ModelWrapValidatorHandler[SearchSpec]) -> SearchSpec:
        if not isinstance(data, Mapping) or "merge_method" not in data or "merge" in data:
            return handler(data)
        ours = set(cls.model_fields) - set(MergeSpec.model_fields)
        own = {key: value for key, value in data.items() if key not in ours}
        made = handler({key: value for key, value in data.items() if key not in own} | {"merge": own})
        made._is_merge_spec = True
        return made

    @field_validator("merge", mode="before")
    @classmethod
    def _from_file(cls, value: Any) -> Any:
        if not isinstance(value, str | Path):
            return value
        data, _, _ = specs.read(value)
        data.pop("smoke", None)
        return data

    @field_validator("models")
    @classmethod
    def _free_names(cls, models: dict[str, str]) -> dict[str, str]:
        for name in models:
            if name in ROWS:
                raise ValueError(f"the name {name!r} is that of another row; choose another")
        return models

    @model_validator(mode="after")
    def _consistent(self) -> SearchSpec:
        if (self.merge is None) == (self.base is None and not self.models):
            raise ValueError("give either merge, or base and models")
        if self.merge is None and (self.base is None or not self.models):
            raise ValueError(f"{'base' if self.base is None else 'models'}: required where there is no merge")
        if self.test and self.holdout:
            raise ValueError("give either test or holdout")
        tuning = {_real(file): name for name, task in self.tasks.items() for file in task.data}
        for name, task in self.test.items():
            for file in task.data:
                if _real(file) in tuning:
                    raise ValueError(f"test.{name}: {file} is what {tuning[_real(file)]} is tuned on; give other data")
        return self


def _real(file: str) -> Path:
    return Path(file).expanduser().resolve()
