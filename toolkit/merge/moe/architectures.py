"""Mixture architectures: what each calls its tensors, what it sets in its config, which dense models fit into it.

Names on disk are those of the released checkpoints, one tensor per expert and projection: every version of
transformers reads them, version 5 stacks them while it loads, and so do vLLM and llama.cpp's converter.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from toolkit.errors import Problem
from toolkit.merge.moe.spec import MoeSpec

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
"""The matrices of a gated MLP; the last one writes to the residual stream."""

_HUB_CODE = "deepseek-ai/deepseek-moe-16b-base--"
_QKV = frozenset(f"{p}_proj.weight" for p in "qkvo")
_QKV_BIASES = frozenset(f"{p}_proj.bias" for p in "qkv")


@dataclass(frozen=True)
class Sizes:
    """Numbers that a config states.

    Attributes:
        experts: that the router chooses among.
        per_token: of them, for each token.
        intermediate: width of an expert.
        shared: width of the shared expert, 0 where there is none.
    """

    experts: int
    per_token: int
    intermediate: int
    shared: int = 0


@dataclass(frozen=True)
class Architecture:
    """One mixture architecture.

    Attributes:
        name: for people.
        model_type: in the config.
        model_class: in the config.
        inputs: types of dense models whose attention it has.
        attention: tensors of the attention that it has a place for.
        settings: what a config of it says beside the base's.
        aliases: further names.
        block: module of a layer that holds the experts.
        renamed: what it calls the projections, where not as dense models do.
        shared: module of the shared expert.
        num_shared: fewest and most shared experts.
        shared_gate: whether the shared expert has a gate of its own.
        biases: attention biases that it always has; zeros where the base has none.
        slides: which layers can attend to a window only: `all` of them or none, `each` apart, or `none`.
    """

    name: str
    model_type: str
    model_class: str
    inputs: frozenset[str]
    attention: frozenset[str]
    settings: Callable[[Sizes], dict[str, Any]]
    aliases: tuple[str, ...] = ()
    block: str = "mlp"
    renamed: Mapping[str, str] = field(default_factory=dict)
    shared: str = ""
    num_shared: tuple[int, int] = (0, 0)
    shared_gate: bool = False
    biases: frozenset[str] = frozenset()
    slides: str = "all"

    def expert(self, layer: int, index: int, projection: str) -> str:
        """Name a tensor of an expert."""
        return f"{self._block(layer)}.experts.{index}.{self.renamed.get(projection, projection)}.weight"

    def router(self, layer: int) -> str:
        """Name the router, `[experts, H]`."""
        return f"{self._block(layer)}.gate.weight"

    def shared_expert(self, layer: int, projection: str) -> str:
        """Name a tensor of the shared expert."""
        return f"{self._block(layer)}.{self.shared}.{projection}.weight"

    def shared_router(self, layer: int) -> str:
        """Name the gate of the shared expert, `[1, H]`."""
        return f"{self._block(layer)}.shared_expert_gate.weight"

    def _block(self, layer: int) -> str:
        return f"model.layers.{layer}.{self.block}"

    def is_called(self, text: str) -> bool:
        """Tell whether a user's word, such as `qwen`, is the beginning of its name."""
        return any(_plain(name).startswith(_plain(text)) for name in (self.name, self.model_type, *self.aliases))

    def refuse(self, spec: MoeSpec) -> list[Problem]:
        """Return what it cannot hold of a spec."""
        low, high = self.num_shared
        if not low <= len(spec.shared) <= high:
            wanted = "no shared experts" if high == 0 else "one shared expert" if low else "at most one shared expert"
            hint = "; one with residual_scale 0 has no effect" if low and not spec.shared else ""
            return [Problem("shared_experts", f"{self.name} takes {wanted}, got {len(spec.shared)}{hint}")]
        found: list[Problem] = []
        for index, expert in enumerate(spec.shared):
            where = f"shared_experts[{index}].positive_prompts"
            if self.shared_gate and spec.asks_prompts and not expert.positive_prompts:
                found.append(
                    Problem(where, f"required by gate_mode {spec.gate_mode}: {self.name} gates shared experts")
                )
            if not self.shared_gate and any(expert.prompts):
                found.append(Problem(where, f"{self.name} has no gate for a shared expert, so it takes no prompts"))
        return found


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def _mixtral(sizes: Sizes) -> dict[str, Any]:
    return {
        "num_local_experts": sizes.experts,
        "num_experts_per_tok": sizes.per_token,
        "intermediate_size": sizes.intermediate,
    }


def _qwen3(sizes: Sizes) -> dict[str, Any]:
    # The chosen experts' weights must sum to one, as those of Mixtral do, or copies of an expert would not equal it.
    return {
        "num_experts": sizes.experts,
        "num_experts_per_tok": sizes.per_token,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "moe_intermediate_size": sizes.intermediate,
    }


def _qwen2(sizes: Sizes) -> dict[str, Any]:
    return _qwen3(sizes) | {"shared_expert_intermediate_size": sizes.shared, "qkv_bias": True}


def _deepseek(sizes: Sizes) -> dict[str, Any]:
    parts = ("configuration", "AutoConfig", "Config"), ("modeling", "AutoModel", "Model")
    parts += (("modeling", "AutoModelForCausalLM", "ForCausalLM"),)
    return {
        "n_routed_experts": sizes.experts,
        "n_shared_experts": sizes.shared // sizes.intermediate or None,
        "num_experts_per_tok": sizes.per_token,
        "norm_topk_prob": True,
        "scoring_func": "softmax",
        "first_k_dense_replace": 0,
        "moe_layer_freq": 1,
        "moe_intermediate_size": sizes.intermediate,
        "auto_map": {auto: f"{_HUB_CODE}{file}_deepseek.Deepseek{kind}" for file, auto, kind in parts},
    }


ARCHITECTURES = (
    Architecture(
        "Mixtral",
        "mixtral",
        "MixtralForCausalLM",
        frozenset({"llama", "mistral"}),
        _QKV,
        _mixtral,
        block="block_sparse_moe",
        renamed={"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"},
    ),
    Architecture(
        "DeepSeek-MoE",
        "deepseek",
        "DeepseekForCausalLM",
        frozenset({"llama", "mistral"}),
        _QKV | _QKV_BIASES | {"o_proj.bias"},
        _deepseek,
        shared="shared_experts",
        num_shared=(0, 1),
        slides="none",
    ),
    Architecture(
        "Qwen2-MoE",
        "qwen2_moe",
        "Qwen2MoeForCausalLM",
        frozenset({"llama", "mistral", "qwen2"}),
        _QKV | _QKV_BIASES,
        _qwen2,
        aliases=("Qwen-MoE",),
        shared="shared_expert",
        num_shared=(1, 1),
        shared_gate=True,
        biases=_QKV_BIASES,
        slides="each",
    ),
    Architecture(
        "Qwen3-MoE",
        "qwen3_moe",
        "Qwen3MoeForCausalLM",
        frozenset({"qwen3"}),
        _QKV | _QKV_BIASES | {"o_proj.bias", "q_norm.weight", "k_norm.weight"},
        _qwen3,
    ),
)
"""In the order in which they are tried."""


def choose(spec: MoeSpec, model_type: object) -> Architecture | list[Problem]:
    """Return the first architecture that holds a spec on a base of some type, or why none does."""
    named = [a for a in ARCHITECTURES if not spec.architecture or a.is_called(spec.architecture)]
    if not named:
        known = ", ".join(a.name for a in ARCHITECTURES)
        return [Problem("architecture", f"no architecture is called {spec.architecture!r} (known: {known})")]
    fitting = [a for a in named if model_type in a.inputs]
    if not fitting:
        types = ", ".join(sorted(frozenset().union(*(a.inputs for a in named))))
        what = " or ".join(a.name for a in named)
        return [Problem("base_model", f"is of type {model_type}; {what} can be built from {types}")]
    found: list[Problem] = []
    for architecture in fitting:
        refused = architecture.refuse(spec)
        if not refused:
            return architecture
        found += refused
    return found
