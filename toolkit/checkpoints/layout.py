"""What a tensor's name says: which layer of which stack it belongs to, and its role.

Nothing here knows an architecture. A stack is the part of a name before its first number
(`model.layers`, `transformer.h`, `encoder.block`), and the number is the layer.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import cached_property

_LAYER = re.compile(r"^(.*?)\.(\d+)(?:\.|$)")
_EMBEDDING = re.compile(r"(^|\.)(embed\w*|\w*embeddings?|wte|wpe|tok_embeddings|shared)(\.|$)")
_HEAD = re.compile(r"(^|\.)(lm_head|embed_out|output_projection|score|classifier)(\.|$)")
_NORM = re.compile(r"(norm|ln_\w+|ln\d?|layernorm)\b", re.IGNORECASE)

INPUT_EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "tok_embeddings.weight")
OUTPUT_HEADS = ("lm_head.weight", "embed_out.weight")


def layer_of(name: str) -> tuple[str, int] | None:
    """Return the stack and the layer of a tensor, or `None` outside the layers."""
    match = _LAYER.match(name)
    return (match[1], int(match[2])) if match else None


def role_of(name: str) -> str:
    """Return `"embedding"`, `"head"`, `"norm"`, `"bias"` or `"linear"`."""
    if layer_of(name) is None:
        if _HEAD.search(name):
            return "head"
        if _EMBEDDING.search(name):
            return "embedding"
    if _NORM.search(name):
        return "norm"
    return "bias" if name.endswith("bias") else "linear"


def is_head(name: str) -> bool:
    """Tell whether a tensor is an output head that models may tie to their input embedding."""
    return name.endswith(OUTPUT_HEADS)


def tied_source(name: str, names: Iterable[str]) -> str | None:
    """Return the input embedding whose weights an absent output head `name` shares, if there is one."""
    if not is_head(name):
        return None
    return next((other for other in names if other.endswith(INPUT_EMBEDDINGS)), None)


class Layout:
    """The layers of one model, from its tensor names."""

    def __init__(self, names: Iterable[str]) -> None:
        self.names = tuple(names)

    @cached_property
    def num_layers(self) -> dict[str, int]:
        """Layers of each stack."""
        counts: dict[str, int] = {}
        for name in self.names:
            found = layer_of(name)
            if found:
                counts[found[0]] = max(counts.get(found[0], 0), found[1] + 1)
        return counts

    def depth(self, name: str) -> float:
        """Return how deep a tensor sits, from 0 (embeddings, first layer) to 1 (last layer, final norm, head)."""
        found = layer_of(name)
        if found is None:
            return 0.0 if role_of(name) == "embedding" else 1.0
        last = self.num_layers[found[0]] - 1
        return found[1] / last if last else 0.0
