"""Activations of decoder layers that wait for the backward pass elsewhere, for some tokens, and are made again for the
others."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

from toolkit.adapters.training._chunks import Surroundings
from toolkit.adapters.training._layers import ATTENTION_KERNELS
from toolkit.errors import UnsupportedError

_PROBE = 2
"""Tokens of the pass that tells along which dimension the tokens of every saved tensor lie."""


class Host:
    """Host memory or files, and the thread that moves tensors there.

    Args:
        folder: of the files; `None` keeps tensors in host memory.

    Attributes:
        held: bytes that are there.
        most: largest number of them so far.
        moved: bytes that were copied or written so far.
        seconds: that this took.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self.worker = ThreadPoolExecutor(1, "activations")
        self.held = self.most = self.moved = self.count = 0
        self.seconds = 0.0
        self.last: weakref.ref[Any] | None = None

    def put(self, value: Tensor) -> Held:
        """Move a tensor, in the background."""
        size, number = value.nbytes, self.count
        self.count += 1
        self.held += size
        self.most = max(self.most, self.held)
        ready = torch.cuda.current_stream(value.device).record_event() if value.is_cuda else None
        held = Held(self, value.device, self.worker.submit(self._move, value, number, ready))
        weakref.finalize(held, self._drop, size, number)
        return held

    def _move(self, value: Tensor, number: int, ready: Any) -> Tensor | Path:
        with torch.cuda.stream(torch.cuda.Stream(value.device)) if ready is not None else nullcontext():
            if ready is not None:
                ready.synchronize()
            started = time.perf_counter()
            if self.folder is not None:
                save_file({"value": value.contiguous()}, self._file(number))
                moved: Tensor | Path = self._file(number)
            else:
                moved = value.to("cpu")
        if moved is not value:
            self.seconds, self.moved = self.seconds + time.perf_counter() - started, self.moved + value.nbytes
        return moved

    def _file(self, number: int) -> Path:
        assert self.folder is not None
        return self.folder / f"{number}.safetensors"

    def _drop(self, size: int, number: int) -> None:
        self.held -= size
        if self.folder is not None:
            self.worker.submit(lambda: self._file(number).unlink(missing_ok=True))

    def close(self) -> None:
        """Wait for the thread and end it."""
        self.worker.shutdown()


class Held:
    """A tensor that is elsewhere.

    Args:
        host: that moves it.
        device: that it came from.
        moved: where it is, once it is there.
    """

    def __init__(self, host: Host, device: torch.device, moved: Future[Tensor | Path]) -> None:
        self.host, self.device, self.moved = host, device, moved
        self.read: Future[Tensor] | None = None

    def fetch(self) -> None:
        """Have it read in the background."""
        if self.read is None:
            self.read = self.host.worker.submit(lambda: _read(self.moved.result()))

    def get(self) -> Tensor:
        """Return it on its device."""
        self.fetch()
        assert self.read is not None
        return self.read.result().to(self.device)


def _read(moved: Tensor | Path) -> Tensor:
    return moved if isinstance(moved, Tensor) else load_file(moved)["value"]


@dataclass(frozen=True)
class Whole:
    """A saved tensor of which all tokens are elsewhere, as its memory lies."""

    held: Held
    shape: torch.Size
    strides: tuple[int, ...]


class Part(NamedTuple):
    """A saved tensor of which the first tokens are elsewhere.

    Attributes:
        held: `[N, kept, M]`; `None` where no token is.
        number: of it among the tensors that the layer saves.
        shape: of the whole tensor.
        dim: along which its tokens lie.
        rows: so many rows of tokens lie there, one after another.
    """

    held: Held | None
    number: int
    shape: torch.Size
    dim: int
    rows: int


class _LeaveError(Exception):
    """Raised in a layer where all that was wanted of it is known."""


class LayerPass:
    """One pass of a batch through one decoder layer.

    What it saves for its backward pass is of three kinds. Of the input and of what attention puts out all tokens go to
    the host. Of all else that has tokens the first `kept` do; the others are computed again from the input, without
    attention, so that every token needs only itself. What has no tokens, such as weights, and what layers share, such
    as masks, stays where it is.

    Args:
        call: the layer's own forward, from `[B, T, H]` to the same, with a layer's keyword arguments.
        kwargs: those of the batch.
        hidden: the layer's input.
        kept: tokens of a row.
        host: that they go to.

    Attributes:
        always: bytes of input and attention.
        rest: bytes of all else that has tokens.
        seconds: that the forward pass took.
    """

    def __init__(
        self, call: Callable[..., Any], kwargs: Mapping[str, Any], hidden: Tensor, kept: int, host: Host
    ) -> None:
        self.call, self.kwargs, self.kept, self.host = call, kwargs, kept, host
        self.tokens, self.trains = hidden.shape[1], hidden.requires_grad
        self.around = Surroundings(hidden.device)
        self.around.note()
        self.always = self.rest = self.count = 0
        self.seconds = 0.0
        self.shapes = self._probe(hidden)
        self.whole: dict[int, Whole] = {}
        self.parts: dict[Any, Held | None] = {}
        self.alive: list[Tensor] = []
        self.attention: list[Whole | Any] = []
        self.again: dict[int, Tensor] = {}
        self.before, host.last = host.last, weakref.ref(self)

    def forward(self, hidden: Tensor) -> Tensor:
        """Return the layer's output."""
        self._wait_for_room()
        shared = {t.untyped_storage().data_ptr() for t in _tensors(self.kwargs)}
        self.input = self._keep_whole(hidden)
        started = time.perf_counter()
        with _Watching(self), saved_tensors_hooks(lambda value: self._pack(value, shared), self._unpack):
            out = self.call(hidden, **self.kwargs)
        self.seconds = time.perf_counter() - started
        self.alive.clear()
        if not self.attention:
            raise UnsupportedError("memo: a layer of this model has no attention by a fused kernel; leave memo out")
        return out

    def _probe(self, hidden: Tensor) -> list[torch.Size]:
        """Return the shapes of what is saved in a pass of two tokens."""
        found: list[torch.Size] = []
        piece = hidden[:, :_PROBE].detach().requires_grad_(self.trains)
        with (
            torch.random.fork_rng([hidden.device] if hidden.is_cuda else []),
            saved_tensors_hooks(lambda value: found.append(value.shape), _nothing),
        ):
            self.call(piece, **_cut(self.kwargs, 0, _PROBE))
        return found

    def _wait_for_room(self) -> None:
        """Let no more than two layers' activations be on their way."""
        before = self.before() if self.before is not None else None
        last = before.before() if before is not None and before.before is not None else None
        for held in last.helds() if last is not None else ():
            held.moved.result()

    def helds(self) -> Iterator[Held]:
        """Yield what is elsewhere."""
        yield from (whole.held for whole in self.whole.values())
        yield from (held for held in self.parts.values() if held is not None)

    def _keep_whole(self, value: Tensor) -> Whole:
        """Move a tensor, and all that lies in the same memory."""
        value = value.detach()
        if not _dense(value):
            value = value.contiguous()
        self.alive.append(value)
        held = self.host.put(value.as_strided((value.numel(),), (1,)))
        self.always += value.nbytes
        self.whole[value.data_ptr()] = whole = Whole(held, value.shape, value.stride())
        return whole

    def keep_attention(self, outputs: tuple[Any, ...]) -> None:
        """Move what attention put out."""
        self.attention += [self._keep_whole(o) if isinstance(o, Tensor) and o.numel() else o for o in outputs]

    def _pack(self, value: Tensor, shared: set[int]) -> Tensor | Whole | Part:
        index, self.count = self.count, self.count + 1
        small = self.shapes[index] if index < len(self.shapes) else torch.Size()
        if len(small) != value.dim():
            raise UnsupportedError("memo: a layer of this model computes otherwise for other lengths; leave memo out")
        dims = [d for d in range(value.dim()) if value.shape[d] != small[d]]
        if len(dims) != 1 or value.untyped_storage().data_ptr() in shared:
            return value
        found = self.whole.get(value.data_ptr())
        if found is not None and found.shape.numel() == value.numel() and _dense(value):
            return Whole(found.held, value.shape, value.stride())
        return self._keep_part(value.detach(), index, dims[0], small[dims[0]] // _PROBE)

    def _keep_part(self, value: Tensor, index: int, dim: int, rows: int) -> Part:
        if rows * self.tokens != value.shape[dim]:
            raise UnsupportedError("memo: a layer of this model does not work token by token; leave memo out")
        outer, inner = value.shape[:dim].numel() * rows, value.shape[dim + 1 :].numel()
        key = (value.data_ptr(), outer, inner, value.dtype, None if value.is_contiguous() else value.stride())
        if key not in self.parts:
            self.alive.append(value)
            self.rest += value.nbytes
            first = value.unflatten(dim, (rows, self.tokens)).narrow(dim + 1, 0, self.kept)
            # A copy of its own, unless all is kept: a view would keep the rest in memory.
            first = first.reshape(outer, self.kept, inner) if self.kept == self.tokens else _copied(first, outer, inner)
            self.parts[key] = self.host.put(first) if self.kept else None
        return Part(self.parts[key], index, value.shape, dim, rows)

    def _unpack(self, packed: Tensor | Whole | Part) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        self._read_ahead()
        if isinstance(packed, Whole):
            return packed.held.get().as_strided(packed.shape, packed.strides)
        dim, rows, shape = packed.dim, packed.rows, packed.shape
        pieces = []
        if packed.held is not None:
            pieces.append(packed.held.get().view(*shape[:dim], rows, self.kept, *shape[dim + 1 :]))
        if self.kept < self.tokens:
            pieces.append(self._computed(packed.number).unflatten(dim, (rows, self.tokens - self.kept)))
        return (torch.cat(pieces, dim + 1) if len(pieces) > 1 else pieces[0]).reshape(shape)

    def _read_ahead(self) -> None:
        """Have the activations of the layer before read, whose turn is next."""
        before, self.before = self.before() if self.before is not None else None, None
        for held in before.helds() if before is not None else ():
            held.fetch()

    def _computed(self, index: int) -> Tensor:
        """Return what is computed again of a saved tensor; all of them are at once, each is given away once."""
        if index not in self.again:
            self.again = dict(enumerate(self._compute()))
        return self.again.pop(index)

    def _compute(self) -> list[Tensor]:
        found: list[Tensor] = []

        def note(value: Tensor) -> None:
            found.append(value.detach())
            if len(found) == self.count:
                raise _LeaveError

        whole = self.input.held.get().as_strided(self.input.shape, self.input.strides)
        piece = whole[:, self.kept :].detach().requires_grad_(self.trains)
        with torch.enable_grad(), self.around.again(0), _Given(self), saved_tensors_hooks(note, _nothing):
            try:
                self.call(piece, **_cut(self.kwargs, self.kept, self.tokens))
            except _LeaveError:
                return found
        raise UnsupportedError("memo: a layer of this model computes otherwise for fewer tokens; leave memo out")


class _Watching(TorchDispatchMode):
    """Moves what attention puts out."""

    def __init__(self, layer: LayerPass) -> None:
        super().__init__()
        self.layer = layer

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in ATTENTION_KERNELS:
            self.layer.keep_attention(out)
        return out


class _Given(TorchDispatchMode):
    """Gives what attention put out for the last tokens, and what was drawn for them."""

    def __init__(self, layer: LayerPass) -> None:
        super().__init__()
        self.kept, self.tokens = layer.kept, layer.tokens
        self.attention = iter(layer.attention)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in ATTENTION_KERNELS:
            count = len(func._schema.returns)
            return tuple(self._last(next(self.attention)) for _ in range(count))
        if func is torch.ops.aten.bernoulli_.float:
            return args[0].copy_(self._drawn(args[0]).bernoulli_(*args[1:])[:, self.kept :])
        if func is torch.ops.aten.native_dropout.default:
            mask = func(torch.ones_like(self._drawn(args[0])), *args[1:])[1][:, self.kept :]
            return args[0] * mask / (1 - args[1]), mask
        if torch.Tag.nondeterministic_seeded in func.tags:
            raise UnsupportedError(f"memo: {func} draws numbers in a layer of this model; leave memo out")
        return func(*args, **(kwargs or {}))

    def _last(self, output: Any) -> Any:
        """Return an output of attention, `[B, H, T, ...]`, for the tokens that are computed again."""
        if not isinstance(output, Whole):
            return output
        value = output.held.get().as_strided(output.shape, output.strides)
        return value[:, :, self.kept : self.tokens].clone() if value.dim() > 2 else value.clone()

    def _drawn(self, piece: Tensor) -> Tensor:
        """Return a tensor for all tokens, of which `[B, T, ...]` is a piece."""
        if piece.dim() < 2 or piece.shape[1] != self.tokens - self.kept:
            raise UnsupportedError("memo: dropout in a layer of this model is not on tokens; leave memo out")
        return piece.new_empty(piece.shape[0], self.tokens, *piece.shape[2:])


def _nothing(value: Any) -> Any:
    raise AssertionError("a pass that only looks has no backward pass")


def _copied(value: Tensor, outer: int, inner: int) -> Tensor:
    return value.clone(memory_format=torch.contiguous_format).view(outer, -1, inner) if value.numel() else value


def _dense(value: Tensor) -> bool:
    """Tell whether a tensor fills its memory without gaps or overlaps."""
    return sum((n - 1) * s for n, s in zip(value.shape, value.stride(), strict=True)) + 1 == value.numel()


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        yield from (t for inner in value.values() for t in _tensors(inner))
    elif isinstance(value, list | tuple):
        yield from (t for inner in value for t in _tensors(inner))


def _cut(kwargs: Mapping[str, Any], start: int, stop: int) -> dict[str, Any]:
    """Return a layer's arguments for the tokens from `start` to `stop`, among themselves."""
    found = dict(kwargs)
    if isinstance(found.get("attention_mask"), Tensor):
        found["attention_mask"] = found["attention_mask"][..., start:stop, start:stop]
    for key in ("position_ids", "cache_position"):
        if isinstance(found.get(key), Tensor):
            found[key] = found[key][..., start:stop]
    if found.get("position_embeddings") is not None:
        found["position_embeddings"] = tuple(t[..., start:stop, :] for t in found["position_embeddings"])
    return found
