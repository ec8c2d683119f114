"""Back-propagation in chunks along the sequence: what runs forward without a graph, and backward piece by piece."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from toolkit.data.render import IGNORED
from toolkit.errors import UnsupportedError


class Surroundings:
    """What a forward pass draws its random numbers from and casts to, for the same pass again."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.enabled = torch.is_autocast_enabled(device.type)
        self.dtype = torch.get_autocast_dtype(device.type)
        self.states: list[tuple[Tensor, Tensor | None]] = []

    def note(self) -> None:
        """Remember the state of the generators at the beginning of a chunk."""
        of_device = torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None
        self.states.append((torch.get_rng_state(), of_device))

    def casting(self) -> torch.autocast:
        """Cast inside the block as then."""
        # A weight that was cast without a graph must not be taken from the cache for one.
        return torch.autocast(self.device.type, self.dtype, enabled=self.enabled, cache_enabled=False)

    @contextmanager
    def again(self, chunk: int) -> Iterator[None]:
        """Draw and cast inside the block as in the chunk of a number."""
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices), self.casting():
            own, of_device = self.states[chunk]
            torch.set_rng_state(own)
            if of_device is not None:
                torch.cuda.set_rng_state(of_device, self.device)
            yield


def spans(length: int, chunk: int) -> list[tuple[int, int]]:
    """Cut a length into chunks, the last of which may be shorter."""
    return [(start, min(start + chunk, length)) for start in range(0, length, chunk)]


class _KeysKnownError(Exception):
    """Raised inside of a layer where only its keys and values are wanted."""


class _Filled:
    """Stands for a layer's cache: keys and values of all chunks so far, without gradients.

    Attributes:
        keys: `[B, H, T, D]`, or `None` before the first chunk.
        values: likewise.
        stop: leave the layer once they are known.
    """

    def __init__(self, length: int, *, stop: bool = False) -> None:
        self.length, self.stop, self.end = length, stop, 0
        self.keys: Tensor | None = None
        self.values: Tensor | None = None

    def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append a chunk; return all so far."""
        if self.keys is None or self.values is None:
            self.keys = keys.new_empty(*keys.shape[:2], self.length, keys.shape[3])
            self.values = values.new_empty(*values.shape[:2], self.length, values.shape[3])
        start, self.end = self.end, self.end + keys.shape[2]
        self.keys[:, :, start : self.end] = keys
        self.values[:, :, start : self.end] = values
        if self.stop:
            raise _KeysKnownError
        return self.keys[:, :, : self.end], self.values[:, :, : self.end]


class _Joined:
    """Stands for a layer's cache: earlier keys and values as leaves of a chunk's graph.

    Attributes:
        own: keys and values of the chunk itself.
    """

    def __init__(self, before: Sequence[Tensor]) -> None:
        self.before = before
        self.own: tuple[Tensor, ...] = ()

    def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Return all up to this chunk."""
        self.own = keys, values
        if not self.before:
            return keys, values
        return torch.cat([self.before[0], keys], dim=2), torch.cat([self.before[1], values], dim=2)


class LayerRun:
    """One pass of a batch through one decoder layer.

    Args:
        call: the layer's own forward, from `[B, T, H]` to the same, with a layer's keyword arguments.
        kwargs: those of the whole batch.
        length: of the rows.
        chunk: tokens of a chunk.
        device: of the batch.
    """

    def __init__(
        self, call: Callable[..., Any], kwargs: Mapping[str, Any], length: int, chunk: int, device: torch.device
    ) -> None:
        self.call, self.kwargs, self.spans = call, kwargs, spans(length, chunk)
        self.around = Surroundings(device)

    def forward(self, hidden: Tensor) -> Tensor:
        """Return the layer's output, `[B, T, H]`; only called without a graph."""
        cache, out = _Filled(hidden.shape[1]), torch.empty_like(hidden)
        for span in self.spans:
            self.around.note()
            out[:, slice(*span)] = self._piece(hidden[:, slice(*span)], span, cache)
        if cache.keys is None:
            raise UnsupportedError("streambp: a layer of this model has no keys and values; leave streambp out")
        return out

    def _piece(self, piece: Tensor, span: tuple[int, int], cache: Any) -> Tensor:
        out = self.call(piece, **_sliced(self.kwargs, *span), past_key_values=cache)
        if not isinstance(out, Tensor):
            raise UnsupportedError("streambp: a layer of this model has more than one output; leave streambp out")
        return out

    def backward(self, hidden: Tensor, gradient: Tensor, parameters: Sequence[Tensor]) -> list[Tensor]:
        """Return the gradients of the layer's input and of its parameters.

        Args:
            hidden: its input, `[B, T, H]`.
            gradient: with respect to its output.
            parameters: those that are trained.
        """
        keys, values = self._keys(hidden)
        of_keys, of_values = _zeros(keys), _zeros(values)
        of_hidden, totals = torch.empty_like(hidden), [_zeros(p) for p in parameters]
        # Last chunk first: a chunk's keys get gradients from all later ones.
        for index in reversed(range(len(self.spans))):
            start, stop = self.spans[index]
            piece = hidden[:, start:stop].detach().requires_grad_()
            before = [t[:, :, :start].detach().requires_grad_() for t in (keys, values)] if start else []
            cache = _Joined(before)
            with torch.enable_grad(), self.around.again(index):
                out = self._piece(piece, (start, stop), cache)
            incoming = [of_keys[:, :, start:stop].to(keys.dtype), of_values[:, :, start:stop].to(values.dtype)]
            found = torch.autograd.grad(
                [out, *cache.own],
                [piece, *before, *parameters],
                [gradient[:, start:stop], *incoming],
                allow_unused=True,
            )
            of_hidden[:, start:stop] = found[0]
            for total, part in zip((of_keys, of_values), found[1 : 1 + len(before)], strict=False):
                total[:, :, :start] += part
            _add(totals, found[1 + len(before) :])
        return [of_hidden, *(t.to(p.dtype) for t, p in zip(totals, parameters, strict=True))]

    def _keys(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Compute keys and values of all tokens, and nothing that comes after them."""
        cache = _Filled(hidden.shape[1], stop=True)
        for index, span in enumerate(self.spans):
            with torch.no_grad(), self.around.again(index):
                try:
                    self._piece(hidden[:, slice(*span)], span, cache)
                except _KeysKnownError:
                    continue
        assert cache.keys is not None
        assert cache.values is not None
        return cache.keys, cache.values


def _zeros(like: Tensor) -> Tensor:
    """Return zeros in which many parts can be added up."""
    return torch.zeros_like(like, dtype=torch.promote_types(like.dtype, torch.float32))


def _add(totals: Sequence[Tensor], parts: Sequence[Tensor | None]) -> None:
    for total, part in zip(totals, parts, strict=True):
        if part is not None:
            total += part


def _sliced(kwargs: Mapping[str, Any], start: int, stop: int) -> dict[str, Any]:
    """Return a layer's arguments for the queries from `start` to `stop`, and the keys up to `stop`."""
    found = {key: value for key, value in kwargs.items() if key != "past_key_values"}
    mask = found.get("attention_mask")
    if mask is not None:
        found["attention_mask"] = mask[..., start:stop, :stop]
    elif start:  # torch's own causal mask would put the first query at the first key
        device = found["position_ids"].device if found.get("position_ids") is not None else None
        allowed = torch.ones(stop - start, stop, dtype=torch.bool, device=device).tril(start)
        found["attention_mask"] = allowed[None, None]
    if found.get("position_ids") is not None:
        found["position_ids"] = found["position_ids"][..., start:stop]
    if found.get("position_embeddings") is not None:
        found["position_embeddings"] = tuple(t[..., start:stop, :] for t in found["position_embeddings"])
    return found


class StreamedLayer(torch.autograd.Function):
    """A decoder layer of which nothing but the input is kept."""

    @staticmethod
    def forward(ctx: Any, run: LayerRun, hidden: Tensor, *parameters: Tensor) -> Tensor:
        """Return the layer's output."""
        ctx.run = run
        ctx.save_for_backward(hidden, *parameters)
        return run.forward(hidden)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Return the gradients of its input and its parameters."""
        hidden, *parameters = ctx.saved_tensors
        return None, *ctx.run.backward(hidden, gradient, parameters)


class HeadRun:
    """One pass of a batch through the head, with the cross-entropy.

    Args:
        head: from `[B, T, H]` to logits.
        labels: `[B, T]`, -100 where a token is not trained.
        chunk: tokens of a chunk.
        around: of the head's own call.
    """

    def __init__(self, head: Callable[[Tensor], Tensor], labels: Tensor, chunk: int, around: Surroundings) -> None:
        self.head, self.labels, self.around = head, labels, around
        self.spans = spans(labels.shape[1] - 1, chunk)

    def losses(self, hidden: Tensor, span: tuple[int, int]) -> Tensor:
        """Return the cross-entropy of what follows the tokens of a chunk, `[B, stop - start]` float32."""
        logits = self.head(hidden).float()
        targets = self.labels[:, span[0] + 1 : span[1] + 1]
        return nn.functional.cross_entropy(
            logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="none"
        ).view(targets.shape)


class StreamedLoss(torch.autograd.Function):
    """The cross-entropy of every token, `[B, T - 1]`, without the logits of more than a chunk."""

    @staticmethod
    def forward(ctx: Any, run: HeadRun, hidden: Tensor, *parameters: Tensor) -> Tensor:
        """Return the losses."""
        ctx.run = run
        ctx.save_for_backward(hidden, *parameters)
        found = []
        for span in run.spans:
            run.around.note()
            with run.around.casting():
                found.append(run.losses(hidden[:, slice(*span)], span))
        return torch.cat(found, 1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Return the gradients of hidden states and parameters."""
        hidden, *parameters = ctx.saved_tensors
        of_hidden, totals = torch.zeros_like(hidden), [_zeros(p) for p in parameters]
        for index, (start, stop) in enumerate(ctx.run.spans):
            piece = hidden[:, start:stop].detach().requires_grad_()
            with torch.enable_grad(), ctx.run.around.again(index):
                losses = ctx.run.losses(piece, (start, stop))
            found = torch.autograd.grad(losses, [piece, *parameters], gradient[:, start:stop])
            of_hidden[:, start:stop] = found[0]
            _add(totals, found[1:])
        return None, of_hidden, *(t.to(p.dtype) for t, p in zip(totals, parameters, strict=True))
