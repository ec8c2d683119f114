"""Trained keys and values that every query of an attention sees before all others.

They reach the attention as if they had been in its cache, so any attention of transformers that asks its cache for
keys and values has them, with its own mask and kernel. As in PEFT's prefix tuning they are not rotated, and positions
of tokens stay what they are.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from toolkit.errors import UnsupportedError


def key_shape(attention: nn.Module, config: Any) -> tuple[int, int]:
    """Return key heads and their size.

    Args:
        attention: module; one that knows its own sizes is asked first, as they may differ from layer to layer.
        config: of the model.
    """
    text = config.get_text_config()
    heads = text.num_attention_heads
    size = getattr(attention, "head_dim", None) or getattr(text, "head_dim", None) or text.hidden_size // heads
    project: Any = getattr(attention, "k_proj", None)
    if project is not None:
        return project.out_features // size, size
    return getattr(text, "num_key_value_heads", None) or heads, size


class PrefixedCache:
    """A cache, or none, whose keys and values come out with a prefix before them.

    Args:
        cache: of the model, or `None`.
        keys: `[P, key heads, head size]`.
        values: likewise.
    """

    def __init__(self, cache: Any, keys: Tensor, values: Tensor) -> None:
        self.cache, self.keys, self.values = cache, keys, values

    def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Keep new keys and values `[B, key heads, T, head size]`; return all of them, the prefix first."""
        if self.cache is not None:
            keys, values = self.cache.update(keys, values, *args, **kwargs)
        return _before(keys, self.keys), _before(values, self.values)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.cache, name)


def _before(tensor: Tensor, prefix: Tensor) -> Tensor:
    prefix = prefix.to(tensor).transpose(0, 1).expand(len(tensor), -1, -1, -1)
    return torch.cat([prefix, tensor], dim=2)


def prefixed_mask(mask: Any, size: int, queries: int, attention: nn.Module) -> Any:
    """Return an attention mask with `size` columns more, which every query sees.

    Args:
        mask: of the model: `[B, 1, Q, K]` or `[B, K]`, bool or added to the scores; or `None`.
        size: tokens of the prefix.
        queries: tokens that ask.
        attention: the module.

    Raises:
        UnsupportedError: a mask of another kind, as of flex attention.
    """
    config: Any = attention.config
    if mask is None:
        causal = config._attn_implementation == "sdpa" and getattr(attention, "is_causal", True) and queries > 1
        return _causal(size, queries, attention) if causal else None
    if not isinstance(mask, Tensor):
        raise UnsupportedError(f"prefixes do not work with attention {config._attn_implementation!r}; take sdpa")
    return functional.pad(mask, (size, 0), value=0 if mask.is_floating_point() else 1)


def _causal(size: int, queries: int, attention: nn.Module) -> Tensor:
    """Return what sdpa's `is_causal` means, which it counts from the first key and not from the prefix's end.

    transformers leaves the mask to sdpa only where there is one query, or nothing in the cache.
    """
    device = next(attention.parameters()).device
    seen = torch.ones(queries, queries, dtype=torch.bool, device=device).tril()
    return functional.pad(seen, (size, 0), value=True)[None, None]
