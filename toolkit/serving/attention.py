"""Paged attention under an unmodified transformers model.

The model is loaded with the attention implementation `toolkit`. A forward pass with `paged=PagedStep(...)` among
its keyword arguments stores keys and values in pages and attends to them; without it, it is an ordinary forward
pass through torch's attention, which is how prompts are embedded for routing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from toolkit.errors import UnsupportedError
from toolkit.kernels.decode_attention import decode_attention
from toolkit.kernels.impl import Impl
from toolkit.kernels.paging import PagedBatch, store
from toolkit.kernels.prefill_attention import prefill_attention
from toolkit.serving.memory import Memory
from toolkit.serving.observe import Observed

if TYPE_CHECKING:
    from torch import nn

NAME = "toolkit"

_UNDERSTOOD = {
    "scaling",
    "dropout",
    "sliding_window",
    "softcap",
    "position_ids",
    "is_causal",
    "use_cache",
    "cache_position",
}


@dataclass(frozen=True)
class PagedStep:
    """What the attention of one step needs.

    Attributes:
        memory: keys and values of all layers.
        batch: the sequences, decodes first.
        impl: form of the attention operations, `None` for the device's own.
    """

    memory: Memory
    batch: PagedBatch
    impl: Impl | None = None


def paged_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    paged: PagedStep | None = None,
    observed: Observed | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attend as transformers asks an attention implementation to.

    Args:
        module: the attention layer; its `layer_idx` names its cache.
        query: `[1, H, T, D]`, rotary embedding applied.
        key: `[1, G, T, D]`.
        value: the same.
        attention_mask: used only without `paged`.
        scaling: of the scores.
        paged: the step, when the engine runs it.
        observed: where the layer's heads are noted.

    Returns:
        `[1, T, H, D]`.
    """
    if observed is not None:
        observed.heads[_layer(module)] = key.shape[1], key.shape[3]
    if paged is None and kwargs.get("softcap") is not None:
        scale = scaling if scaling is not None else query.shape[-1] ** -0.5
        return _soft_capped(query, key, value, attention_mask, scale, kwargs["softcap"]), None
    if paged is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    _check_understood(module, attention_mask, kwargs)
    q, k, v = (t[0].transpose(0, 1) for t in (query, key, value))
    batch = paged.batch
    k_cache, v_cache = paged.memory.keys[_layer(module)], paged.memory.values[_layer(module)]
    store(k_cache, batch.slots, k)
    store(v_cache, batch.slots, v)
    options = {
        "scale": scaling if scaling is not None else q.shape[-1] ** -0.5,
        "window": kwargs.get("sliding_window"),
        "soft_cap": kwargs.get("softcap"),
        "impl": paged.impl,
    }
    q = q.contiguous()
    n, rows = batch.num_decodes, batch.starts
    parts: list[torch.Tensor] = []
    if n:
        lengths = batch.lengths if n == len(batch.lengths) else batch.lengths[:n]  # a slice would be a mere list
        at = lengths, batch.tables[:n]
        parts.append(decode_attention(q[:n], k_cache, v_cache, *at, first_pages=batch.first_pages[:n], **options)[0])
    if n < len(batch.lengths):
        starts = [row - rows[n] for row in rows[n:]]
        out = prefill_attention(q[rows[n] :], k_cache, v_cache, starts, batch.lengths[n:], batch.tables[n:], **options)
        parts.append(out[0])
    return (parts[0] if len(parts) == 1 else torch.cat(parts))[None], None


def _layer(module: nn.Module) -> int:
    return int(module.layer_idx)  # pyright: ignore[reportArgumentType]


def _soft_capped(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float,
    soft_cap: float,
) -> torch.Tensor:
    """Attend with capped scores, which torch's attention cannot; shapes as in `paged_attention`, of any batch size."""
    groups, length = query.shape[1] // key.shape[1], key.shape[2]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = soft_cap * torch.tanh(torch.matmul(query, key.transpose(2, 3)).float() * scaling / soft_cap)
    if mask is None:  # transformers makes none where it is the causal one
        mask = torch.ones(query.shape[2], length, dtype=torch.bool, device=query.device).tril(length - query.shape[2])
    scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min) if mask.dtype == torch.bool else scores + mask
    return torch.matmul(scores.softmax(dim=-1).to(value.dtype), value).transpose(1, 2)


def _check_understood(module: nn.Module, mask: torch.Tensor | None, options: Mapping[str, Any]) -> None:
    """Refuse what would be ignored: options that ask for something, and any mask but the engine's placeholder."""
    given = [name for name, value in options.items() if value is not None and value is not False]
    unknown = [name for name in given if name not in _UNDERSTOOD]
    if unknown:
        raise UnsupportedError(
            f"{type(module).__name__} passes {', '.join(unknown)}, which paged attention does not know"
        )
    if mask is not None and mask.numel() > 1:
        raise UnsupportedError(f"{type(module).__name__} makes a mask of its own, which paged attention cannot apply")


AttentionInterface.register(NAME, paged_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
