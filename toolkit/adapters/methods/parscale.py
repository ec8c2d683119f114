"""ParScale: several streams of the same input, each with its own trained prefix, mixed for every token at the end.

Each of `streams` copies of a row sees its own keys and values before all others, in every layer; they are not rotated,
and the row's own tokens start at position 0. After the last norm the streams are weighted by
`softmax(W2 silu(W1 [h_1; ...; h_P]))`, smoothed as `w (1 - eps) + eps / P`, and summed. In a cache the streams of a row
are as many heads of it, so whatever reorders rows keeps them together.

Chen et al., "Parallel Scaling Law for Language Models", 2025, arXiv:2505.10475.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from toolkit.adapters.methods._base import Site, register, uniform
from toolkit.adapters.methods._decoder import DecoderConfig, DecoderLayer, last_states, with_last_states
from toolkit.adapters.methods._prefix import key_shape, prefixed_mask
from toolkit.adapters.methods._unified import SUBLAYERS

_OF_ROWS = ("input_ids", "inputs_embeds", "attention_mask", "position_ids", "token_type_ids")


@dataclass
class ParscaleConfig(DecoderConfig):
    """ParScale.

    Attributes:
        streams: copies of every row.
        prefix: tokens of each prefix; 0 is none.
        smoothing: `eps`, the share that all streams have alike.
    """

    streams: int = 4
    prefix: int = 48
    smoothing: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.streams < 1 or self.prefix < 0 or not 0 <= self.smoothing <= 1:
            raise ValueError("streams is at least 1, prefix at least 0, and smoothing between 0 and 1")


class StreamedCache:
    """A cache, or none, of a batch whose rows are streams; prefixes come out before its keys and values.

    Args:
        cache: of the model, or `None`.
        keys: `[P, key heads, n, head size]`.
        values: likewise.
    """

    def __init__(self, cache: Any, keys: Tensor, values: Tensor) -> None:
        self.cache, self.keys, self.values = cache, keys, values

    def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Keep new keys and values `[B * P, key heads, T, head size]`; return all of them, the prefixes first."""
        if self.cache is not None:
            shape = keys.shape[:2]
            kept = (tensor.reshape(-1, len(self.keys) * shape[1], *tensor.shape[2:]) for tensor in (keys, values))
            keys, values = (t.reshape(*shape, *t.shape[2:]) for t in self.cache.update(*kept, *args, **kwargs))
        return _before(keys, self.keys), _before(values, self.values)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.cache, name)


def _before(tensor: Tensor, prefixes: Tensor) -> Tensor:
    return torch.cat([prefixes.to(tensor).repeat(len(tensor) // len(prefixes), 1, 1, 1), tensor], dim=2)


class ParscaleLayer(DecoderLayer):
    """A decoder that runs every row in several streams."""

    TRAINED = ("prefix_keys", "prefix_values", "mix_in", "mix_in_bias", "mix_out", "mix_out_bias")

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__(base_layer)
        # For good, as recomputed activations need them too; without active adapters they do nothing.
        self._hooks = [
            module.register_forward_pre_hook(partial(self._before_attention, index), with_kwargs=True)
            for index, module in enumerate(self.attentions)
        ]

    def leave(self) -> None:
        """Take the hooks off the attentions."""
        for hook in self._hooks:
            hook.remove()

    @property
    def attentions(self) -> list[nn.Module]:
        """The attention of every layer.

        Raises:
            ValueError: a layer has none of a known name.
        """
        found = [
            next((m for n, m in layer.named_children() if n in SUBLAYERS["attention"]), None) for layer in self.layers
        ]
        if not all(found):
            raise ValueError("a layer of the decoder has no attention of a known name")
        return found  # pyright: ignore[reportReturnType]

    def start(self, config: ParscaleConfig, site: Site) -> Mapping[str, Tensor]:
        """Draw prefixes and the two layers that mix."""
        heads, size = key_shape(self.attentions[0], site.config)
        count, wide = config.streams, site.config.get_text_config().hidden_size
        tensors = {
            "mix_in": uniform((wide, count * wide), fan_in=count * wide),
            "mix_in_bias": torch.zeros(wide),
            "mix_out": uniform((count, wide), fan_in=wide),
            "mix_out_bias": torch.zeros(count),
        }
        if config.prefix:
            shape = (len(self.layers), count, heads, config.prefix, size)
            tensors |= {f"prefix_{kind}": torch.randn(shape) * 0.02 for kind in ("keys", "values")}
        return tensors

    def _before_attention(self, index: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Let an attention find the prefixes before all keys and values."""
        names = self.running()
        if not names:
            return None
        keys, values = (torch.cat([self._prefix(n, kind, index) for n in names]) for kind in ("keys", "values"))
        x = args[0] if args else kwargs["hidden_states"]
        mask = kwargs.get("attention_mask")
        if keys.shape[2]:
            mask = prefixed_mask(mask, keys.shape[2], x.shape[1], module)
        cache = StreamedCache(kwargs.get("past_key_values"), keys, values)
        return args, kwargs | {"past_key_values": cache, "attention_mask": mask}

    def _prefix(self, adapter: str, kind: str, index: int) -> Tensor:
        """Return `[P, key heads, n, head size]`."""
        if self.has(adapter, f"prefix_{kind}"):
            return self.tensor(adapter, f"prefix_{kind}")[index]
        heads, size = key_shape(self.attentions[index], self.get_base_layer().config)
        weight = self.tensor(adapter, "mix_in")
        return weight.new_zeros(self.configs[adapter].streams, heads, 0, size)

    def run(self, adapters: list[str], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run all streams of all rows; the mixtures of several adapters are averaged."""
        if len({self.configs[name].prefix for name in adapters}) > 1:
            raise ValueError("adapters with prefixes of different lengths cannot be active together")
        counts = [self.configs[name].streams for name in adapters]
        repeated = {name: self._repeated(name, value, kwargs, sum(counts)) for name, value in kwargs.items()}
        output = self.base_layer(
            *(value.repeat_interleave(sum(counts), 0) for value in args[:1]), *args[1:], **repeated
        )
        states = last_states(output)
        streams = states.reshape(-1, sum(counts), *states.shape[1:]).movedim(1, -2)
        parts = streams.split(counts, dim=-2)
        mixed = [self.mix(name, part) for name, part in zip(adapters, parts, strict=True)]
        return with_last_states(output, torch.stack(mixed).mean(0).to(states.dtype) if len(mixed) > 1 else mixed[0])

    def _repeated(self, name: str, value: Any, kwargs: Mapping[str, Any], count: int) -> Any:
        if name not in _OF_ROWS or not isinstance(value, Tensor):
            return value
        rows = next((len(v) for n in ("input_ids", "inputs_embeds") if (v := kwargs.get(n)) is not None), len(value))
        return value if len(value) != rows else value.repeat_interleave(count, 0)

    def weights(self, adapter: str, streams: Tensor) -> Tensor:
        """Return how much each stream counts, `[B, T, P]`, one in sum.

        Args:
            adapter: its name.
            streams: `[B, T, P, H]`.
        """
        inner = functional.linear(
            streams.flatten(-2), self.tensor(adapter, "mix_in"), self.tensor(adapter, "mix_in_bias")
        )
        scores = functional.linear(
            functional.silu(inner), self.tensor(adapter, "mix_out"), self.tensor(adapter, "mix_out_bias")
        )
        smoothing = self.configs[adapter].smoothing
        return scores.softmax(-1) * (1 - smoothing) + smoothing / scores.shape[-1]

    def mix(self, adapter: str, streams: Tensor) -> Tensor:
        """Return the weighted sum of the streams, `[B, T, H]`."""
        dtype = self.tensor(adapter, "mix_in").dtype
        if streams.shape[-2] == 1:
            return streams[..., 0, :]
        shares = self.weights(adapter, streams.to(dtype))
        return (shares[..., None] * streams.to(dtype)).sum(-2).to(streams.dtype)


register("parscale", ParscaleConfig, ParscaleLayer)
