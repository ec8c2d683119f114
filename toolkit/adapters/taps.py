"""What passes between the layers of a frozen decoder, for networks that are trained beside it.

The decoder runs without a graph, so nothing of it is kept for a backward pass: the memory of training is that of the
side network and of the tapped states, `[B, T, H]` each, however wide the decoder's feed-forward networks are.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from inspect import signature
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from toolkit.errors import UnsupportedError


class Call(NamedTuple):
    """What a layer was given besides hidden states.

    Attributes:
        kwargs: mask, positions, cache, and so on, by the layer's own names.
    """

    kwargs: dict[str, Any]

    @property
    def cache(self) -> Any:
        """The cache of the whole model, or `None`."""
        return self.kwargs.get("past_key_values")


@dataclass
class Taps:
    """What was seen of one forward pass.

    Attributes:
        states: what entered the first layer, then what left each, `[B, T, H]`.
        calls: of each layer.
    """

    states: list[Tensor] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)


def decoder_layers(decoder: nn.Module) -> nn.ModuleList:
    """Return the layers of a decoder.

    Raises:
        ValueError: it has no list of them.
    """
    config: Any = decoder.config
    count = config.get_text_config().num_hidden_layers
    for module in decoder.children():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return module
    raise ValueError(f"{type(decoder).__name__} has no list of its {count} layers")


@contextmanager
def tapped(layers: Iterable[nn.Module]) -> Iterator[Taps]:
    """Watch the first layers of a decoder, or all, inside the block."""
    seen = Taps()

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        names = list(signature(type(module).forward).parameters)[1:]
        given = dict(zip(names, args, strict=False)) | kwargs
        states = given.pop(names[0])
        if not seen.states:
            seen.states.append(states)
        seen.calls.append(Call(given))

    def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        seen.states.append(output[0] if isinstance(output, tuple) else output)

    handles: list[Any] = []
    for layer in layers:
        handles += [layer.register_forward_pre_hook(before, with_kwargs=True), layer.register_forward_hook(after)]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def extend(cache: Any, index: int, like: int) -> None:
    """Make a model's cache have a layer of some number, of the kind of another; side networks keep theirs behind it.

    Raises:
        UnsupportedError: a cache that cannot grow.
    """
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

    while len(cache.layers) <= index:
        layer = cache.layers[like]
        if isinstance(layer, DynamicSlidingWindowLayer):
            cache.layers.append(DynamicSlidingWindowLayer(sliding_window=layer.sliding_window))
        elif isinstance(layer, DynamicLayer):
            cache.layers.append(DynamicLayer())
        else:
            raise UnsupportedError(f"a side network needs a cache that grows, not {type(layer).__name__}")


def visible(call: Call, queries: int, keys: int, device: torch.device) -> Tensor:
    """Return which tokens see which, as a layer's attention mask has it, `[B or 1, queries, keys]` bool.

    Raises:
        UnsupportedError: a mask of another kind, as of flex attention.
    """
    mask = call.kwargs.get("attention_mask")
    causal = torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)[None]
    if mask is None:
        return causal
    if not isinstance(mask, Tensor):
        raise UnsupportedError("a side network needs a mask that is a tensor; take sdpa or eager attention")
    if mask.ndim == 2:
        return causal & mask[:, None, -keys:].bool()
    return mask[:, 0, :, :keys] if mask.dtype == torch.bool else mask[:, 0, :, :keys] >= 0
