"""Which axes of which tensors may be permuted together, so that a model computes what it did before.

A transformer has three kinds of units whose order means nothing:

- the features of the residual stream, in everything that reads from it or writes to it: embeddings, norms, the inputs
  and outputs of all layers, the head. One permutation for the whole model.
- the hidden units of an MLP: the rows of its gate and up projections and the columns of its down projection. One
  permutation per layer.
- the heads of an attention, as whole blocks. One permutation per layer; query heads that share a key-value head stay
  together and move with it.

The order inside a head is left alone, because rotary embeddings pair its features. Norms over features (RMSNorm,
LayerNorm) commute with all of these.

Tensors are recognised by their names, which the families of transformers share; one that is not known is an error,
since a tensor that stayed behind would change the function. So is ALiBi, which tells heads apart by their number.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from toolkit.checkpoints.headers import TensorInfo
from toolkit.checkpoints.layout import layer_of
from toolkit.checkpoints.reader import Checkpoint
from toolkit.errors import UnsupportedError

Permutation = NDArray[np.int64]
"""`[size]`: unit `i` of the permuted model is unit `permutation[i]` of the model as it was."""

RESIDUAL = "residual"
"""Name of the group of the residual stream."""

_MODULES = (
    # pattern of a module outside the layers, what its outputs are, what its inputs are
    (r"(.*\.)?(embed_tokens|embed_in|embed_positions|wte|wpe)", "", "residual"),
    (r"(.*\.)?(lm_head|embed_out|score)", "", "residual"),
    (r"(.*\.)?(norm|ln_f|final_layernorm|final_layer_norm)", "residual", ""),
)
_LAYER_MODULES = (
    (r"self_attn\.q_proj", "query", "residual"),
    (r"self_attn\.[kv]_proj", "key", "residual"),
    (r"self_attn\.qkv_proj|attn\.c_attn", "query, key, key", "residual"),
    (r"attention\.query_key_value", "query with key and value", "residual"),
    (r"self_attn\.(o_proj|out_proj|dense)|attention\.dense|attn\.c_proj", "residual", "query"),
    (r"self_attn\.q_(norm|layernorm)", "query norm", ""),
    (r"self_attn\.k_(norm|layernorm)", "key norm", ""),
    (r"(mlp\.)?fc1|mlp\.(gate_proj|up_proj|c_fc|dense_h_to_4h)", "hidden", "residual"),
    (r"mlp\.gate_up_proj", "hidden, hidden", "residual"),
    (r"(mlp\.)?fc2|mlp\.(down_proj|c_proj|dense_4h_to_h)", "residual", "hidden"),
    (r"\w*(norm|layernorm)|ln_[12]", "residual", ""),
)
_BUFFERS = re.compile(r"(.*\.)?(rotary_emb\.inv_freq|(attn|attention)\.(bias|masked_bias))")
"""What old checkpoints store besides weights; the same for every model."""

_CONV1D = re.compile(r"attn\.(c_attn|c_proj)|mlp\.(c_fc|c_proj)")
"""Modules that GPT-2 stores as `[in, out]`."""


@dataclass(frozen=True)
class Group:
    """Units that are permuted together.

    Attributes:
        name: `residual`, or the layer's with `.mlp` or `.attention`.
        size: number of units: features, hidden units or query heads.
        shared: query heads of one key-value head, which stay neighbours; 1 for all other units.
    """

    name: str
    size: int
    shared: int = 1

    def identity(self) -> Permutation:
        """Return the permutation that leaves everything where it is."""
        return np.arange(self.size)


@dataclass(frozen=True)
class Part:
    """A stretch of an axis: blocks of `width` elements, each of which belongs to `per` neighbouring units."""

    width: int
    per: int = 1


@dataclass(frozen=True)
class Axis:
    """One axis of a tensor: the blocks of a group's units, once or several times over."""

    group: Group
    parts: tuple[Part, ...] = (Part(1),)

    @property
    def size(self) -> int:
        """Number of elements."""
        return sum(self.group.size // part.per * part.width for part in self.parts)

    def stretches(self) -> Iterator[tuple[Part, int, int]]:
        """Yield each part with its first element and the one after its last."""
        start = 0
        for part in self.parts:
            stop = start + self.group.size // part.per * part.width
            yield part, start, stop
            start = stop

    def order(self, permutation: Permutation) -> Permutation:
        """Return the element, before, of every element of the axis after the group was permuted."""
        found = []
        for part, start, _ in self.stretches():
            blocks = permutation[:: part.per] // part.per
            found.append(start + (blocks[:, None] * part.width + np.arange(part.width)).reshape(-1))
        return np.concatenate(found)


@dataclass(frozen=True)
class Symmetry:
    """The permutations that leave a model's function alone.

    Attributes:
        groups: by name; the residual stream first.
        axes: of every tensor that has a permuted one, one entry per dimension.
    """

    groups: Mapping[str, Group]
    axes: Mapping[str, tuple[Axis | None, ...]]

    def places(self, group: Group) -> Iterator[tuple[str, int, Axis]]:
        """Yield every tensor that a group permutes, along which dimension, and how."""
        for name, axes in self.axes.items():
            for dimension, axis in enumerate(axes):
                if axis and axis.group == group:
                    yield name, dimension, axis

    def without(self, group: str) -> Symmetry:
        """Return the same with one group left as it is."""
        axes = {
            name: tuple(None if axis is None or axis.group.name == group else axis for axis in found)
            for name, found in self.axes.items()
        }
        groups = {name: found for name, found in self.groups.items() if name != group}
        return Symmetry(groups, {name: found for name, found in axes.items() if any(found)})


def symmetry_of(checkpoint: Checkpoint) -> Symmetry:
    """Find the permutations that leave a model's function alone.

    Raises:
        UnsupportedError: a tensor, or a shape, of an architecture that is not known here.
    """
    return _Reader(checkpoint).read()


class _Reader:
    """Goes through the tensors of one model."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.heads, self.key_heads, self.head_dim = _head_sizes(checkpoint)
        self.conv1d = any(name.endswith("attn.c_attn.weight") for name in checkpoint.tensors)
        self.groups: dict[str, Group] = {}
        self.stack: str | None = None

    def read(self) -> Symmetry:
        axes = {name: self._axes(info) for name, info in self.checkpoint.tensors.items()}
        groups = dict(sorted(self.groups.items(), key=lambda item: item[0] != RESIDUAL))
        return Symmetry(groups, {name: found for name, found in axes.items() if any(found)})

    def _axes(self, info: TensorInfo) -> tuple[Axis | None, ...]:
        if _BUFFERS.fullmatch(info.name):
            return (None,) * len(info.shape)
        module, _, kind = info.name.rpartition(".")
        layer, rules = "", _MODULES
        found = layer_of(info.name)
        if found:
            self.stack = self.stack or found[0]
            layer, rules = f"{found[0]}.{found[1]}", _LAYER_MODULES
            module = module.removeprefix(f"{layer}.")
        words = next((rule[1:] for rule in rules if re.fullmatch(rule[0], module)), None)
        if words is None or kind not in ("weight", "bias") or (found and found[0] != self.stack):
            raise self._unsupported(info, "is not a tensor of an architecture that can be aligned")
        if kind == "weight" and self.conv1d and _CONV1D.fullmatch(module):
            words = words[::-1]
        wanted = words if len(info.shape) == 2 else words[:1]
        if len(wanted) != len(info.shape) or not info.dtype.floating:
            raise self._unsupported(info, f"is {info.dtype.name} {list(info.shape)}, which cannot be aligned")
        return tuple(self._axis(word, size, layer, info) for word, size in zip(wanted, info.shape, strict=True))

    def _axis(self, word: str, size: int, layer: str, info: TensorInfo) -> Axis | None:
        if not word or (word.endswith("norm") and size == self.head_dim):
            return None
        axis = self._build(word.removesuffix(" norm"), size, layer)
        known = self.groups.setdefault(axis.group.name, axis.group)
        if axis.size != size or known != axis.group:
            wanted = Axis(known, axis.parts).size
            raise self._unsupported(info, f"is {list(info.shape)}; expected {wanted} where it has {size}")
        return axis

    def _build(self, word: str, size: int, layer: str) -> Axis:
        if word == "residual":
            return Axis(Group(RESIDUAL, size))
        if word.startswith("hidden"):
            copies = 1 + word.count(",")
            return Axis(Group(f"{layer}.mlp", size // copies), (Part(1),) * copies)
        shared = self.heads // self.key_heads
        query, key = Part(self.head_dim), Part(self.head_dim, shared)
        parts = {
            "query": (query,),
            "key": (key,),
            "query, key, key": (query, key, key),
            "query with key and value": (Part(3 * self.head_dim),),
        }
        return Axis(Group(f"{layer}.attention", self.heads, shared), parts[word])

    def _unsupported(self, info: TensorInfo, what: str) -> UnsupportedError:
        name = self.checkpoint.architecture or "a model without a named architecture"
        return UnsupportedError(f"{self.checkpoint.source} ({name}): {info.name} {what}")


def _head_sizes(checkpoint: Checkpoint) -> tuple[int, int, int]:
    """Return the number of query heads and of key-value heads, and the features of one."""
    nested = checkpoint.config.get("text_config")
    config: Mapping[str, Any] = nested if isinstance(nested, dict) else checkpoint.config

    def size(*keys: str) -> Any:
        return next((config[key] for key in keys if config.get(key) is not None), None)

    heads, width = size("num_attention_heads", "n_head"), size("hidden_size", "n_embd")
    if not _is_size(heads) or not _is_size(width):
        raise UnsupportedError(f"{checkpoint.source}: config.json does not say how many attention heads there are")
    if config.get("alibi") or config.get("position_embedding_type") == "alibi":
        raise UnsupportedError(f"{checkpoint.source}: heads with ALiBi cannot be permuted: each has a slope of its own")
    key_heads, head_dim = size("num_key_value_heads") or heads, size("head_dim") or width // heads
    if not _is_size(key_heads) or not _is_size(head_dim) or heads % key_heads:
        raise UnsupportedError(
            f"{checkpoint.source}: config.json has {heads} attention heads for {key_heads} key-value heads"
            f" of {head_dim} features"
        )
    return heads, key_heads, head_dim


def _is_size(value: Any) -> bool:
    return type(value) is int and value > 0
