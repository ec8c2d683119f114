"""Back-propagation through a whole model in windows of tokens, of any sizes, one after another."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from toolkit.data.render import IGNORED
from toolkit.errors import UnsupportedError
from toolkit.models.logits import keeps_logits

Pair = tuple[Tensor, Tensor]
"""Something of the keys and of the values of one layer, each `[1, H, T, D]`."""


@dataclass
class Turn:
    """Leave to compute one window.

    Attributes:
        forward: tokens that it may have without gradients.
        backward: tokens that it may have with gradients.
        spent_forward: tokens that it had.
        spent_backward: likewise.
    """

    forward: int
    backward: int
    spent_forward: int = 0
    spent_backward: int = 0


class Pace(Protocol):
    """Says when a window may be computed, and how many tokens it may have."""

    def turn(self) -> AbstractContextManager[Turn]:
        """Wait for a turn; the window is computed inside the block."""
        ...


class Steady:
    """Windows of one size, one right after another.

    Args:
        window: tokens.
    """

    def __init__(self, window: int) -> None:
        self.window = window

    @contextmanager
    def turn(self) -> Iterator[Turn]:
        """See `Pace`."""
        yield Turn(self.window, self.window)


PACE: ContextVar[Pace | None] = ContextVar("PACE", default=None)
"""Whose turns the training in this context waits for, instead of taking windows of its own size."""


@dataclass(frozen=True)
class Document:
    """Tokens that attend to each other.

    Attributes:
        row: of the batch.
        start: its first token's place in the row.
        ids: up to the last that something trained depends on, `[T]`.
        targets: what each is to be followed by, `[T]`, -100 where that is not trained.
    """

    row: int
    start: int
    ids: Tensor
    targets: Tensor


def documents(inputs: Mapping[str, Any]) -> Iterator[Document]:
    """Yield the documents of a batch in which something is trained, without what comes after that.

    Args:
        inputs: `input_ids` and `labels` `[B, T]`; `position_ids` `[B, T]` where rows are packed.
    """
    positions = inputs.get("position_ids")
    for row, (ids, labels) in enumerate(zip(inputs["input_ids"], inputs["labels"], strict=True)):
        begins = [0] if positions is None else (positions[row] == 0).nonzero()[:, 0].tolist()
        for start, stop in zip(begins, [*begins[1:], len(ids)], strict=True):
            targets = labels[start + 1 : stop]
            trained = (targets != IGNORED).nonzero()
            if len(trained):
                length = int(trained[-1]) + 1
                yield Document(row, start, ids[start : start + length], targets[:length])


class Pass:
    """A document on its way through a model: forward from its first token, backward from its last.

    What is kept of a window that was computed without gradients are its keys and values. Backward, it is computed
    again: its queries see the keys before it as leaves, whose gradients wait there until their own windows come.

    Args:
        model: a causal language model, called with a cache of transformers.
        document: its tokens.

    Attributes:
        losses: cross-entropy at every token, `[T]` float32, 0 where it is not trained or not computed yet.
    """

    def __init__(self, model: Any, document: Document) -> None:
        self.model, self.document = model, document
        self.losses = torch.zeros(len(document.ids), device=document.ids.device)
        self.seen, self.left = 0, len(document.ids)
        self._kept: list[Pair] = []
        self._gradients: list[Pair] = []

    def advance(self, turn: Turn, scale: Tensor) -> None:
        """Compute one window, with gradients as soon as one can begin at the last token that has none.

        Args:
            turn: how many tokens it may have.
            scale: of the gradients.
        """
        missing = self.left - turn.backward - self.seen
        if missing > 0:
            turn.spent_forward = min(turn.forward, missing)
            self.forward(turn.spent_forward)
        else:
            turn.spent_backward = min(turn.backward, self.left)
            self._backward(turn.spent_backward, scale)

    @torch.no_grad()
    def forward(self, count: int, *, scored: bool = False) -> None:
        """Compute keys and values of the next tokens, and the losses there if asked for."""
        begin, end = self.seen, self.seen + count
        cache = _cache(self._kept)
        self._losses(begin, end, cache, scored=scored)
        if any(layer.keys is None for layer in cache.layers):
            raise UnsupportedError("token_windows: a layer of this model keeps no keys and values; leave it out")
        self._kept, self.seen = [(layer.keys, layer.values) for layer in cache.layers], end

    def _backward(self, count: int, scale: Tensor) -> None:
        begin, end = self.left - count, self.left
        before: list[Pair] = []
        if begin:
            before = [(_leaf(keys, begin), _leaf(values, begin)) for keys, values in self._kept]
        with torch.enable_grad():
            cache = _cache(before)
            losses = self._losses(begin, end, cache, scored=True)
        ends, gradients = ([], []) if losses is None else ([losses.sum()], [scale])
        for layer, waiting in zip(cache.layers, self._gradients, strict=bool(self._gradients)):
            for made, gradient in zip((layer.keys, layer.values), waiting, strict=True):
                ends.append(made[:, :, begin:])
                gradients.append(gradient[:, :, begin:end])
        pairs = [(e, g) for e, g in zip(ends, gradients, strict=True) if e.requires_grad]
        if pairs:
            torch.autograd.backward(*map(list, zip(*pairs, strict=True)))  # pyright: ignore[reportArgumentType]
        after = self._gradients or [(None, None)] * len(before)
        # Before the first window there is nothing whose gradients could wait.
        pairs_of_layers = zip(before, after, strict=bool(before))
        self._gradients = [(_added(k, keys), _added(v, values)) for (k, v), (keys, values) in pairs_of_layers]
        self._kept, self.left = [(k[:, :, :begin], v[:, :, :begin]) for k, v in self._kept], begin

    def _losses(self, begin: int, end: int, cache: Any, *, scored: bool) -> Tensor | None:
        """Run a window; return the losses of its trained tokens, `None` where there are none, or nobody asks."""
        ids, targets = self.document.ids[begin:end], self.document.targets[begin:end]
        rows = (targets != IGNORED).nonzero()[:, 0] if scored else targets.new_empty(0)
        kept = keeps_logits(_inner(self.model))
        options = {"logits_to_keep": rows if len(rows) else 1} if kept else {}
        logits = self.model(input_ids=ids[None], past_key_values=cache, use_cache=True, **options).logits[0]
        if not len(rows):
            return None
        logits = logits if kept else logits[rows]
        losses = nn.functional.cross_entropy(logits.float(), targets[rows], reduction="none")
        self.losses[begin + rows] = losses.detach()
        return losses


def _inner(model: Any) -> nn.Module:
    """Return the model of transformers inside of PEFT's, whose own call takes anything."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _cache(pairs: list[Pair]) -> Any:
    """Return a cache that begins with keys and values as they are; one of windows keeps all, for masks to choose."""
    cache = DynamicCache()
    for keys, values in pairs:
        layer = DynamicLayer()
        layer.lazy_initialization(keys, values)
        layer.keys, layer.values = keys, values
        cache.layers.append(layer)
    return cache


def _leaf(kept: Tensor, stop: int) -> Tensor:
    return kept[:, :, :stop].detach().requires_grad_()


def _added(leaf: Tensor, waiting: Tensor | None) -> Tensor:
    """Return the gradient that a window left at the keys or values before it, and later windows had left there."""
    own = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
    return own if waiting is None else own + waiting[:, :, : leaf.shape[2]]
