"""One forward pass of a frozen base for the rows of several LoRAs, each of which changes its own rows alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from toolkit.adapters.loop import token_losses
from toolkit.models.modes import modes_kept


@dataclass
class Pair:
    """The factors of one module: `a` `[r, in]`, `b` `[out, r]`."""

    a: nn.Parameter
    b: nn.Parameter
    scale: float


Pairs = Mapping[str, Pair]
"""The factors of a LoRA, by the name of the module that they change."""


def shared_losses(
    model: Any, batch: Mapping[str, Tensor], loras: Sequence[Pairs], sizes: Sequence[int]
) -> list[Tensor]:
    """Return the summed cross-entropy of each LoRA's rows, from one forward pass over all of them.

    Args:
        model: the base.
        batch: `input_ids`, `labels` and what else its rows need, `[B, T]` each.
        loras: whose rows stand one after another in the batch.
        sizes: rows of each.
    """
    given = {name: value.to(model.device) for name, value in batch.items()}
    labels = given.pop("labels")
    stops = torch.tensor(sizes).cumsum(0).tolist()
    rows = [slice(stop - size, stop) for stop, size in zip(stops, sizes, strict=True)]
    with _added(model, loras, rows):
        logits = model(**given, use_cache=False).logits
    losses = token_losses(logits, labels)
    return [losses[own].sum() for own in rows]


@contextmanager
def _added(model: nn.Module, loras: Sequence[Pairs], rows: Sequence[slice]) -> Iterator[None]:
    """Add to what linear layers put out the changes of every LoRA, each on its own rows."""
    handles = []
    for name, module in model.named_modules():
        pairs = [lora.get(name) for lora in loras]
        if any(pairs):
            handles.append(module.register_forward_hook(_hook(pairs, rows)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _hook(pairs: Sequence[Pair | None], rows: Sequence[slice]) -> Any:
    def hook(module: nn.Module, given: tuple[Tensor, ...], out: Tensor) -> Tensor:
        parts = []
        for pair, own in zip(pairs, rows, strict=True):
            if pair is None:
                parts.append(out[own])
            else:
                change = linear(linear(given[0][own].to(pair.a.dtype), pair.a), pair.b) * pair.scale
                parts.append((out[own] + change).to(out.dtype))
        return torch.cat(parts)

    return hook


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Hold a model in training mode with no weight of its own trained."""
    trained = {p: p.requires_grad for p in model.parameters()}
    with modes_kept(model):
        model.train()
        for p in trained:
            p.requires_grad_(False)
        try:
            yield
        finally:
            for p, was in trained.items():
                p.requires_grad_(was)
