"""A forward pass over several sequences at once, each with its own pages, and how far two passes' logits are apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch

from toolkit.kernels.impl import Impl
from toolkit.kernels.paging import PagedBatch
from toolkit.models.logits import keeps_logits
from toolkit.serving.attention import PagedStep
from toolkit.serving.memory import Memory

EXACT, ROUNDED = 1e-3, 5e-2
"""How far paged and ordinary logits may be apart, as a share of their spread: with 32 bits or more, with fewer."""


@dataclass(frozen=True)
class Part:
    """The tokens of one sequence in a pass.

    Attributes:
        tokens: their ids.
        start: tokens of the sequence before them, whose keys and values are there.
        pages: of the sequence.
    """

    tokens: Sequence[int]
    start: int
    pages: Sequence[int]


def paged_logits(
    model: Any, memory: Memory, parts: Sequence[Part], keep: Sequence[int], impl: Impl | None = None
) -> torch.Tensor:
    """Run the tokens of all parts as one flat batch.

    Args:
        model: loaded with the toolkit's attention.
        memory: where the pages are.
        parts: single tokens come before the others.
        keep: rows of the batch after which logits are wanted.
        impl: form of the attention operations, `None` for the device's own.

    Returns:
        `[len(keep), V]` float32.
    """
    device = model.device
    ids = torch.tensor([[token for part in parts for token in part.tokens]], device=device)
    positions = torch.tensor([[part.start + i for part in parts for i in range(len(part.tokens))]], device=device)
    rows = torch.tensor(list(keep), dtype=torch.long, device=device)
    return forward(model, memory, ids, positions, _batch(parts, memory.page_size, device), rows, impl)


def forward(
    model: Any,
    memory: Memory,
    ids: torch.Tensor,
    positions: torch.Tensor,
    batch: PagedBatch,
    keep: torch.Tensor,
    impl: Impl | None = None,
) -> torch.Tensor:
    """Run a flat batch that is on the device.

    Args:
        model: loaded with the toolkit's attention.
        memory: where the pages are.
        ids: `[1, T]`.
        positions: `[1, T]`.
        batch: its sequences.
        keep: `[K]` rows after which logits are wanted.
        impl: form of the attention operations, `None` for the device's own.

    Returns:
        `[K, V]` float32.
    """
    kept = keeps_logits(model)
    output = model(
        input_ids=ids,
        position_ids=positions,
        # transformers returns a mask of four dimensions as it is, so none is built; ours needs none.
        attention_mask=torch.zeros(1, 1, 1, 1, device=ids.device),
        use_cache=False,
        paged=PagedStep(memory, batch, impl),
        **({"logits_to_keep": keep} if kept else {}),
    )
    logits = output.logits[0] if kept else output.logits[0, keep]
    return logits.float()


def _batch(parts: Sequence[Part], page_size: int, device: torch.device) -> PagedBatch:
    lengths = [part.start + len(part.tokens) for part in parts]
    width = -(-max(lengths) // page_size)
    return PagedBatch(
        starts=[0, *accumulate(len(part.tokens) for part in parts)],
        lengths=lengths,
        first_pages=[_first_page(p.pages, page_size, length) for p, length in zip(parts, lengths, strict=True)],
        tables=torch.tensor([([*part.pages] + [0] * width)[:width] for part in parts], device=device),
        slots=torch.tensor(
            [
                slot
                for p, length in zip(parts, lengths, strict=True)
                for slot in slots(p.pages, page_size, p.start, length)
            ],
            device=device,
        ),
        num_decodes=sum(len(part.tokens) == 1 for part in parts),
    )


def slots(pages: Sequence[int], page_size: int, start: int, stop: int) -> list[int]:
    """Return where in the memory the tokens of a sequence are, from one to another."""
    return [pages[token // page_size] * page_size + token % page_size for token in range(start, stop)]


def _first_page(pages: Sequence[int], page_size: int, length: int) -> int | None:
    """Return the first page of a sequence whose pages follow each other as far as its tokens go."""
    used = -(-length // page_size)
    first = pages[0]
    if pages[used - 1] != first + used - 1 or list(pages[:used]) != list(range(first, first + used)):
        return None
    return first


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the largest difference of logits as a share of the spread of those that are expected.

    Raises:
        ValueError: none of these is a number.
    """
    finite = expected.isfinite()
    if not finite.any():
        raise ValueError("its logits are no numbers; are its weights whole?")
    spread = expected[finite].max() - expected[finite].min()
    return float((found[finite] - expected[finite]).abs().max() / spread)


def allowed(dtype: torch.dtype) -> float:
    """Return the largest distance of logits that is rounding."""
    return EXACT if dtype.itemsize >= 4 else ROUNDED
