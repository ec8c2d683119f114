"""The specs of token routers: to serve one, and to train the gates of those that are trained."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, model_validator

from toolkit import specs
from toolkit.specs import Files, Folder, FolderOrObject, Spec


class TokenRouterSpec(Spec):
    """A token router to serve.

    Attributes:
        router: name of a file in `toolkit/routing/token/routers`, for one that is made of its adapters.
        adapters: served names of the adapters that it mixes.
        folder: of a trained router, or of a ScaLearn adapter with uniform scales, instead; the names of its experts
            must be served.
        top_k: experts of a token, where the kind has it.
        temperature: of the softmax over their scores, likewise.
    """

    router: str | None = None
    adapters: list[str] = Field(default_factory=list)
    folder: Folder | None = None
    top_k: int | None = None
    temperature: float | None = None

    @model_validator(mode="after")
    def _one_source(self) -> TokenRouterSpec:
        if (self.folder is None) == (self.router is None):
            raise ValueError("give either router (such as arrow) and adapters, or folder (of a trained router)")
        if self.router is not None and len(set(self.adapters)) < max(1, len(self.adapters)):
            raise ValueError("adapters: name the adapters to mix, each once")
        if self.folder is not None and self.adapters:
            raise ValueError("adapters: a trained router names its own")
        return self

    @property
    def parameters(self) -> dict[str, Any]:
        """Parameters of the kind that were given."""
        return {n: v for n, v in (("top_k", self.top_k), ("temperature", self.temperature)) if v is not None}


def _as_router(value: Any) -> Any:
    return {"folder": value} if isinstance(value, str | Path) else value


def token_router_spec(value: TokenRouterSpec | Mapping[str, Any] | str | Path) -> TokenRouterSpec:
    """Read a token router's block, or its folder alone.

    Raises:
        SpecError: the block is wrong.
    """
    return value if isinstance(value, TokenRouterSpec) else specs.validate(_as_router(value), TokenRouterSpec)


ServedTokenRouter = Annotated[TokenRouterSpec, BeforeValidator(_as_router)]
"""A token router's block, or its folder alone."""


class GatedExpertSpec(Spec):
    """An expert whose gate is trained.

    Attributes:
        adapter: folder of its LoRA.
        data: files with rows that it was trained on, or such rows.
    """

    adapter: Folder
    data: Files


class DispatchSpec(Spec):
    """How rows get to the experts of a mixture in training; the engine never drops any.

    Attributes:
        capacity_factor: places of an expert, as a multiple of its even share; 0 as many as are needed; negative as
            many as are needed but at most that.
        by_priority: rows of which the gate is surest get places first, instead of those that come first.
        balance: weight of the loss that keeps experts evenly used.
    """

    capacity_factor: float = 0.0
    by_priority: bool = False
    balance: Annotated[float, Field(ge=0)] = 0.01


class GatesSpec(Spec):
    """Gates to train over frozen experts.

    Attributes:
        router: `phatgoose`, a gate for every expert on its own data, kept beside the adapter; or `mixture`, gates for
            all experts together.
        base: model that the experts are of.
        experts: by name; those of a mixture must be served under these.
        parameters: of the router's kind.
        dispatch: of a mixture.
        steps: of AdamW, for every expert of `phatgoose`.
        batch_size: rows of a step.
        learning_rate: of AdamW.
        max_length: tokens of a row; longer ones are cut.
        seed: of the rows that are drawn.
        device: `auto`, `cpu`, `cuda`, ...
        trust_remote_code: run code that comes with the base.
        out: folder of a mixture.
    """

    router: str = "phatgoose"
    base: FolderOrObject
    experts: Annotated[dict[str, GatedExpertSpec], Field(min_length=1)]
    parameters: dict[str, Any] = Field(default_factory=dict)
    dispatch: DispatchSpec = DispatchSpec()
    steps: Annotated[int, Field(ge=1)] = 100
    batch_size: Annotated[int, Field(ge=1)] = 8
    learning_rate: Annotated[float, Field(gt=0)] = 5e-3
    max_length: Annotated[int, Field(ge=2)] | None = None
    seed: int = 0
    device: str = "auto"
    trust_remote_code: bool = False
    out: Folder | None = None

    @model_validator(mode="after")
    def _known(self) -> GatesSpec:
        if self.router not in ("phatgoose", "mixture"):
            raise ValueError(f"router: gates are trained for phatgoose or mixture, not for {self.router!r}")
        if self.router == "phatgoose" and (self.dispatch != DispatchSpec() or self.out is not None):
            raise ValueError("dispatch and out belong to a mixture; a gate of phatgoose lies beside its adapter")
        return self
