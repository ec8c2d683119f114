"""The spec of a mixture of experts: what mergekit-moe's users write, and a seed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from toolkit.errors import Problem
from toolkit.merge.spec import MergeSpec, Model  # noqa: F401 - pydantic looks up what Model mentions
from toolkit.specs import Spec

Finite = Annotated[float, Field(allow_inf_nan=False)]
GateMode = Literal[
    "hidden", "hidden_last", "hidden_avg", "mlp_input", "mlp_input_avg", "cheap_embed", "random", "uniform_random"
]


class ExpertSpec(Spec):
    """One expert.

    Attributes:
        source_model: a full checkpoint, a LoRA folder or compressed deltas (`FOLDER#TASK`) of the base, `model+lora`,
            or a merge, which is computed as it is read; its MLPs are taken.
        positive_prompts: texts whose tokens go to this expert.
        negative_prompts: texts whose tokens do not.
        noise_scale: standard deviation of noise that is added to its weights, so that training can tell copies apart.
        residual_scale: factor of what the expert adds to the residual stream.
    """

    source_model: Model
    positive_prompts: list[str] | None = None
    negative_prompts: list[str] | None = None
    noise_scale: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    residual_scale: Finite | None = None

    @property
    def prompts(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Positive and negative prompts."""
        return tuple(self.positive_prompts or ()), tuple(self.negative_prompts or ())


class MoeSpec(Spec):
    """A mixture of experts.

    Attributes:
        base_model: whose attention, norms, embeddings, config and tokenizer the output has; it may be a merge.
        experts: among which the router chooses, token by token.
        gate_mode: what a router holds for an expert, layer by layer: `hidden` (or `hidden_last`) the state that enters
            the layer at the last token of its prompts, `hidden_avg` the mean over their tokens; `mlp_input` and
            `mlp_input_avg` the state that enters the layer's MLP, which is what a router sees; `cheap_embed` the mean
            of the tokens' embeddings; `random` normal or `uniform_random` uniform numbers, to be trained.
        dtype: of the output; by default each tensor has that of the base's.
        experts_per_token: experts that see a token.
        shared_experts: that see every token; Qwen2-MoE has one behind a gate of its own, DeepSeek-MoE one or none.
        architecture: of the output: `mixtral`, `deepseek`, `qwen` or `qwen3`; by default the first that fits.
        seed: of random routers and of noise.
    """

    base_model: Model
    experts: Annotated[list[ExpertSpec], Field(min_length=1)]
    gate_mode: GateMode = "hidden"
    dtype: str | None = None
    experts_per_token: Annotated[int, Field(ge=1)] = 2
    shared_experts: list[ExpertSpec] | None = None
    architecture: str | None = None
    seed: int = 0

    @property
    def shared(self) -> list[ExpertSpec]:
        """The shared experts, if there are any."""
        return self.shared_experts or []

    @property
    def asks_prompts(self) -> bool:
        """Whether routers are made from prompts."""
        return self.gate_mode not in ("random", "uniform_random")

    def slots(self) -> Iterator[tuple[str, ExpertSpec]]:
        """Yield every expert with its key path, the shared ones last."""
        for index, expert in enumerate(self.experts):
            yield f"experts[{index}]", expert
        for index, expert in enumerate(self.shared):
            yield f"shared_experts[{index}]", expert

    def faults(self) -> list[Problem]:
        """Return what is wrong whatever the models are."""
        found: list[Problem] = []
        if self.experts_per_token > len(self.experts):
            found.append(
                Problem("experts_per_token", f"is {self.experts_per_token}, but there are {len(self.experts)} experts")
            )
        if not self.asks_prompts:
            return found
        for index, expert in enumerate(self.experts):
            if not expert.positive_prompts:
                message = f"required by gate_mode {self.gate_mode}: texts that this expert is good at"
                found.append(Problem(f"experts[{index}].positive_prompts", message))
        given = {expert.prompts for expert in self.experts}
        if len(self.experts) > 1 and len(given) == 1 and given != {((), ())}:
            found.append(Problem("experts", "all have the same prompts, so that no router could tell them apart"))
        return found
