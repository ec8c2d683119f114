"""How keys and values lie in pages, and what an attention operation needs to know of a batch.

The cache of one layer is `[P, page, G, D]`: P pages of `page` tokens, G key/value heads, D features. A sequence
owns a list of pages, its block table; token `t` of it lies in page `table[t // page]` at `t % page`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class PagedBatch:
    """The sequences of one flat batch of T query tokens.

    Attributes:
        starts: first query row of each sequence, and T at the end.
        lengths: tokens of each sequence that attention sees, this step's included.
        tables: `[S, max pages]` int64, block table of each sequence, padded with any page.
        first_pages: of the sequences whose pages follow each other; `None` for others.
        slots: `[T]` int64, `page * page_size + offset` of each query token.
        num_decodes: leading sequences that have exactly one query token; the others are prefills.
    """

    starts: list[int]
    lengths: list[int]
    tables: torch.Tensor
    first_pages: list[int | None]
    slots: torch.Tensor
    num_decodes: int


def gather(cache: torch.Tensor, table: torch.Tensor, length: int) -> torch.Tensor:
    """Return the first `length` tokens of the sequences of `table`.

    Args:
        cache: `[P, page, G, D]`.
        table: `[..., pages]`.
        length: tokens to return.

    Returns:
        `[..., length, G, D]`.
    """
    page, heads, size = cache.shape[1:]
    needed = -(-length // page)
    tokens = cache[table[..., :needed]]
    return tokens.reshape(*table.shape[:-1], needed * page, heads, size)[..., :length, :, :]


def store(cache: torch.Tensor, slots: torch.Tensor, values: torch.Tensor) -> None:
    """Write the keys or values of new tokens, `[T, G, D]`, into their slots; pages may lie apart."""
    page, values = cache.shape[1], values.to(cache.dtype)
    if cache.stride(0) == page * cache.stride(1):  # the pages are one plain run of tokens
        cache.flatten(0, 1).index_copy_(0, slots, values)
    else:
        cache.index_put_((slots // page, slots % page), values)


def visible(
    first: int, stop: int, length: int, window: int | None, device: torch.device, num_global: int = 0
) -> torch.Tensor:
    """Return `[stop - first, length]`: which tokens the queries at positions `first` to `stop` see.

    Args:
        first: may be negative; queries before the first token see none.
        stop: may lie past the tokens.
        length: tokens there are.
        window: tokens that a query sees, itself included; `None` sees all.
        device: of the result.
        num_global: first tokens that later queries see whatever the window.
    """
    query = torch.arange(first, stop, device=device)[:, None]
    key = torch.arange(length, device=device)[None]
    seen = key <= query
    return seen if window is None else seen & ((key > query - window) | (key < num_global))
