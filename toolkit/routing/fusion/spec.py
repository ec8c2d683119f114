"""The spec of a large model that small experts steer."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from toolkit.specs import Files, Folder, FolderOrObject, Spec


class FusionSpec(Spec):
    """Models that share a vocabulary, and what they are asked.

    Attributes:
        large: the model that is steered.
        base: the small model that the experts were fine-tuned from.
        experts: small fine-tuned models by name, or adapters of the small base.
        method: name of a file in `toolkit/routing/fusion/methods`.
        parameters: of the method.
        prompts: files of prompts; where rows have answers, the result says how many were given exactly.
        limit: most prompts that are taken, the first ones.
        chat: put prompts into the chat template, where the large model's tokenizer has one.
        max_tokens: most tokens of an answer.
        temperature: of the sampling; 0 takes the likeliest token.
        top_p: share of the probability that tokens are sampled from.
        seed: of the sampling.
        device: `auto`, `cpu`, `cuda`, ...
        dtype: of the weights, such as `bfloat16`; by default as stored, but float32 on a CPU.
        trust_remote_code: run code that comes with the models.
        out: folder for the answers.
    """

    large: FolderOrObject
    base: FolderOrObject
    experts: Annotated[dict[str, FolderOrObject], Field(min_length=1)]
    method: str = "dynamic_logits_fusion"
    parameters: dict[str, Any] = Field(default_factory=dict)
    prompts: Files | None = None
    limit: Annotated[int, Field(ge=1)] | None = None
    chat: bool = True
    max_tokens: Annotated[int, Field(ge=1)] = 256
    temperature: Annotated[float, Field(ge=0)] = 0.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    seed: int = 0
    device: str = "auto"
    dtype: str | None = None
    trust_remote_code: bool = False
    out: Folder | None = None
