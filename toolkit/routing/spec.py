"""The specs of a router: to fit one, and to judge one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, field_validator

from toolkit.routing.embedding import EmbeddingSpec
from toolkit.specs import Files, Folder, FolderOrObject, Spec


class ExpertSpec(Spec):
    """One thing to choose.

    Attributes:
        data: JSONL files of prompts that it should get.
        limit: most prompts that are taken from them, the first ones.
    """

    data: Files
    limit: Annotated[int, Field(ge=1)] | None = None


class RouteSpec(Spec):
    """A router to fit.

    Attributes:
        router: name of a file in `toolkit/routing/routers`.
        experts: what can be chosen, by the name under which it is served; a file name stands for its `data`.
        embedding: where prompt vectors come from.
        parameters: of the router's kind.
        out: folder to write.
    """

    router: str = "centroid"
    experts: Annotated[dict[str, ExpertSpec], Field(min_length=1)]
    embedding: EmbeddingSpec
    parameters: dict[str, Any] = Field(default_factory=dict)
    out: Folder | None = None

    @field_validator("experts", mode="before")
    @classmethod
    def _files(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {name: {"data": v} if isinstance(v, str | Path | list) else v for name, v in value.items()}


class RouteEvaluateSpec(Spec):
    """A router to judge.

    Attributes:
        router: a router, or its folder.
        data: expert -> JSONL files of prompts that were made for it.
        base: model that the experts belong to; without it only the choices are judged, not their answers.
        adapters: PEFT LoRA folder of each expert.
        max_tokens: most tokens of an answer.
        limit: most prompts of each expert, the first ones.
        device: `auto`, `cpu`, `cuda`, ...
        trust_remote_code: run code that comes with the base, or with the model of the router's embedding.
        out: folder for the results.
    """

    router: FolderOrObject
    data: Annotated[dict[str, Files], Field(min_length=1)]
    base: FolderOrObject | None = None
    adapters: dict[str, Folder] = Field(default_factory=dict)
    max_tokens: Annotated[int, Field(ge=1)] = 64
    limit: Annotated[int, Field(ge=1)] | None = None
    device: str = "auto"
    trust_remote_code: bool = False
    out: Folder | None = None
