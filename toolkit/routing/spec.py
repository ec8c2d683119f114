"""The specs of routers: to fit one, to judge one, to compare several, and to set how one decides."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from toolkit.routing.embedding import EmbeddingSpec
from toolkit.routing.policy import PolicySpec
from toolkit.routing.words import WordsSpec
from toolkit.specs import Files, Folder, FolderOrObject, Spec

Share = Annotated[float, Field(gt=0, lt=1)]


class FeaturesSpec(Spec):
    """What a router sees of a prompt; several are put side by side.

    Attributes:
        embedding: mean hidden states of the base, or of an encoder.
        words: hashed tf-idf, which needs no model.
        form: how far length, numbers, choices and the like count beside the others, such as 0.3; 0 leaves them out.
    """

    embedding: EmbeddingSpec | None = None
    words: WordsSpec | None = None
    form: Annotated[float, Field(ge=0)] = 0.0

    @model_validator(mode="after")
    def _some(self) -> FeaturesSpec:
        if self.embedding is None and self.words is None and not self.form:
            raise ValueError("no features: give embedding (a model), words (no model), form (such as 1), or several")
        return self


class ExpertSpec(Spec):
    """One thing to choose.

    Attributes:
        data: JSONL files of prompts that it should get.
        limit: most prompts that are taken from them, the first ones.
    """

    data: Files
    limit: Annotated[int, Field(ge=1)] | None = None


class OutcomesSpec(Spec):
    """What experts' answers were worth: rows of `query_id, query, model, score, cost`, or one row per prompt.

    Attributes:
        data: JSONL, CSV or Parquet files, or a data set.
        scores: of rows of one prompt each: expert -> the field with its score; `query`, `prompt` or `text` is the
            prompt.
        costs: expert -> cost of an answer, for rows that have no `cost`.
        category: field that names what a prompt is about.
        limit: most prompts that are taken, the first ones.
    """

    data: Files
    scores: dict[str, str] = Field(default_factory=dict)
    costs: dict[str, float] = Field(default_factory=dict)
    category: str | None = None
    limit: Annotated[int, Field(ge=1)] | None = None


class RouteSpec(FeaturesSpec):
    """A router to fit, from prompts that were made for experts or from what experts' answers were worth.

    Attributes:
        router: name of a file in `toolkit/routing/routers`.
        experts: what can be chosen, by the name under which it is served; a file name stands for its `data`.
        outcomes: measured answers, instead of `experts`.
        parameters: of the router's kind.
        policy: how a choice follows from the scores.
        folds: parts of the prompts; as many more fits, each without one of them, tell how new prompts score, and so
            what drift is. Of many prompts not all parts are needed. 0 saves those fits, and nothing is then told.
        scope: share of the router's own prompts that may be taken for prompts of another kind; what is farther from
            all of them goes to the policy's fallback. Without it nothing is out of scope.
        out: folder to write.
    """

    router: str = "centroid"
    experts: Annotated[dict[str, ExpertSpec], Field(min_length=1)] | None = None
    outcomes: OutcomesSpec | None = None
    parameters: dict[str, Any] = Field(default_factory=dict)
    policy: PolicySpec = PolicySpec()
    scope: Share | None = None
    folds: Annotated[int, Field(ge=0)] = 5
    out: Folder | None = None

    @field_validator("experts", mode="before")
    @classmethod
    def _files(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {name: {"data": v} if isinstance(v, str | Path | list) else v for name, v in value.items()}

    @model_validator(mode="after")
    def _one_source(self) -> RouteSpec:
        if (self.experts is None) == (self.outcomes is None):
            raise ValueError("give either experts (prompts made for each) or outcomes (measured answers)")
        return self


class RouteEvaluateSpec(Spec):
    """A router to judge.

    Attributes:
        router: a router, or its folder.
        data: expert -> JSONL files of prompts that were made for it.
        outcomes: measured answers, instead of `data`.
        before: the router that this one replaces, or its folder; the decisions that moved are counted.
        base: model that the experts belong to; without it only the choices are judged, not their answers.
        adapters: PEFT LoRA folder of each expert.
        max_tokens: most tokens of an answer.
        limit: most prompts of each expert, the first ones.
        device: `auto`, `cpu`, `cuda`, ...
        trust_remote_code: run code that comes with the base, or with the model of the router's embedding.
        plot: draw the cost-quality curve into the folder, which needs matplotlib.
        out: folder for the results.
    """

    router: FolderOrObject
    data: Annotated[dict[str, Files], Field(min_length=1)] | None = None
    outcomes: OutcomesSpec | None = None
    before: FolderOrObject | None = None
    base: FolderOrObject | None = None
    adapters: dict[str, Folder] = Field(default_factory=dict)
    max_tokens: Annotated[int, Field(ge=1)] = 64
    limit: Annotated[int, Field(ge=1)] | None = None
    device: str = "auto"
    trust_remote_code: bool = False
    plot: bool = False
    out: Folder | None = None

    @model_validator(mode="after")
    def _one_source(self) -> RouteEvaluateSpec:
        if (self.data is None) == (self.outcomes is None):
            raise ValueError("give either data (prompts made for each expert) or outcomes (measured answers)")
        if self.outcomes is not None and self.base is not None:
            raise ValueError("outcomes are measured already; base and adapters belong to data")
        return self


class CandidateSpec(Spec):
    """A router to compare.

    Attributes:
        router: name of a file in `toolkit/routing/routers`.
        features: name of one of the comparison's `features`.
        parameters: of the router's kind.
    """

    router: str
    features: str
    parameters: dict[str, Any] = Field(default_factory=dict)


class CompareSpec(Spec):
    """Routers to compare on measured answers, each fitted on one part of the rows and judged on the rest.

    Attributes:
        outcomes: measured answers.
        features: what routers see, by name.
        routers: what is compared, by the name that the table shows.
        split: `rows` draws single rows for the test part, `categories` whole categories, so that a router meets what it
            was never fitted on.
        train: share of the rows, or of the categories, that routers are fitted on.
        seeds: of the draws; one fit and one judgement each.
        out: folder for the results.
    """

    outcomes: OutcomesSpec
    features: Annotated[dict[str, FeaturesSpec], Field(min_length=1)]
    routers: Annotated[dict[str, CandidateSpec], Field(min_length=1)]
    split: Literal["rows", "categories"] = "rows"
    train: Share = 0.7
    seeds: Annotated[list[int], Field(min_length=1)] = Field(default_factory=lambda: [0, 1, 2, 3, 4])
    out: Folder | None = None

    @model_validator(mode="after")
    def _names(self) -> CompareSpec:
        for name, candidate in self.routers.items():
            if candidate.features not in self.features:
                known = ", ".join(self.features)
                raise ValueError(f"routers.{name}.features: no features {candidate.features!r} (known: {known})")
        if self.split == "categories" and self.outcomes.category is None:
            raise ValueError("split: categories needs outcomes.category, the field that names them")
        return self


class CalibrateSpec(Spec):
    """What a router may spend, and the prompts by which that is set.

    Attributes:
        router: its folder.
        prompts: files of prompts as they will come; or `outcomes`, whose answers then show what the budget buys.
        outcomes: measured answers.
        share: expert -> share of the requests that it is to get.
        cost: most cost per request on average, in the unit of the costs.
        scope: share of the prompts that may be taken for prompts of another kind, for a router that was fitted with
            `scope`; such as prompts in the users' own words, which are farther from those of the fit than these are
            from each other.
        costs: expert -> cost of an answer; by default those of the outcomes.
        trust_remote_code: run code that comes with the model of the router's embedding.
        out: folder to write; by default the router's own.
    """

    router: FolderOrObject
    prompts: Files | None = None
    outcomes: OutcomesSpec | None = None
    share: Annotated[dict[str, Share], Field(min_length=1, max_length=1)] | None = None
    cost: float | None = None
    scope: Share | None = None
    costs: dict[str, float] = Field(default_factory=dict)
    trust_remote_code: bool = False
    out: Folder | None = None

    @model_validator(mode="after")
    def _one_each(self) -> CalibrateSpec:
        if (self.prompts is None) == (self.outcomes is None):
            raise ValueError("give either prompts or outcomes")
        if sum(wanted is not None for wanted in (self.share, self.cost, self.scope)) != 1:
            raise ValueError("give one of share (such as {strong: 0.3}), cost (per request) and scope (such as 0.01)")
        return self
