"""Weights that live in host memory or on a disk, and come for the time in which a part of the model computes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn


class Store:
    """Where parameters are while they are not in use; each is there once, however many modules share it.

    Args:
        folder: of their files; `None` keeps them in host memory.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self.numbers: dict[nn.Parameter, int] = {}
        self.held: dict[nn.Parameter, Tensor] = {}
        self.devices: dict[nn.Parameter, torch.device] = {}

    def take(self, parameters: Iterable[nn.Parameter]) -> None:
        """Take the values of parameters, which are empty from now on."""
        for p in parameters:
            if p in self.devices:
                continue
            self.devices[p], self.numbers[p] = p.device, len(self.numbers)
            if self.folder is None:
                host = p.data.to("cpu")
                self.held[p] = host.pin_memory() if p.is_cuda else host
            else:
                save_file({"value": p.data.contiguous()}, self._file(p))
            p.data = p.data.new_empty(0)

    def rows(self, p: nn.Parameter, start: int = 0, stop: int | None = None) -> Tensor:
        """Return the rows of a parameter from `start` to `stop`, by default all, on its device."""
        if self.folder is None:
            value = self.held[p] if start == 0 and stop is None else self.held[p][start:stop]
            return value.to(self.devices[p], non_blocking=True)
        with safe_open(self._file(p), framework="pt") as file:
            if start == 0 and stop is None:
                return file.get_tensor("value").to(self.devices[p])
            return file.get_slice("value")[start:stop].to(self.devices[p])

    def give_back(self) -> None:
        """Put all values back into their parameters."""
        for p in self.devices:
            p.data = self.rows(p)

    def _file(self, p: nn.Parameter) -> Path:
        assert self.folder is not None
        return self.folder / f"{self.numbers[p]}.safetensors"


class Window:
    """The few parts of a model whose weights are on its device, the next one of them read ahead.

    The order in which parts compute is learned in one pass and expected in the next. A part that comes out of order is
    read when it comes, and the order is learned anew.

    Args:
        store: of the weights.
        parts: the weights of every part.
        size: parts at once; at least 2, the second of which is the one read ahead.
    """

    def __init__(self, store: Store, parts: Sequence[Sequence[nn.Parameter]], size: int) -> None:
        self.store, self.parts, self.size = store, parts, size
        self.resident: list[int] = []
        self.order: list[int] = []
        self.seen: list[int] = []
        self.ahead: dict[int, Future[dict[nn.Parameter, Tensor]]] = {}
        self.worker = ThreadPoolExecutor(1, "weights")

    def begin(self) -> None:
        """Begin a pass."""
        self.order, self.seen = self.seen, []

    def enter(self, part: int) -> None:
        """Have the weights of a part in their parameters, those of the oldest part out of them."""
        if not self.seen or self.seen[-1] != part:
            self.seen.append(part)
        if part in self.resident:
            self.resident.remove(part)
        else:
            self._load(part)
        self.resident.append(part)
        while len(self.resident) > self.size - 1:
            self._drop(self.resident.pop(0))
        self._read_ahead()

    def _load(self, part: int) -> None:
        future, missing = self.ahead.pop(part, None), self._missing(part)
        read = future.result() if future is not None else {}
        for p in missing:
            p.data = read[p] if p in read else self.store.rows(p)

    def _missing(self, part: int) -> list[nn.Parameter]:
        """Return the weights of a part that no part in the window holds; a shared one is read once."""
        held = {p for other in self.resident if other != part for p in self.parts[other]}
        return [p for p in self.parts[part] if p not in held]

    def _drop(self, part: int) -> None:
        for p in self._missing(part):
            p.data = p.data.new_empty(0)

    def _read_ahead(self) -> None:
        place = len(self.seen)
        if self.order[:place] != self.seen or place >= len(self.order):
            self.ahead.clear()
            return
        following = self.order[place]
        if following not in self.resident and following not in self.ahead:
            missing = self._missing(following)
            self.ahead = {following: self.worker.submit(lambda: {p: self.store.rows(p) for p in missing})}

    def close(self) -> None:
        """Drop all that is in the window; the values are in the store."""
        self.worker.shutdown(cancel_futures=True)
        self.ahead.clear()


class TiledLinear(torch.autograd.Function):
    """A linear of a frozen weight, of which a few rows are on the device at once."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Callable[[int, int], Tensor], count: int, tile: int) -> Tensor:
        """Return `[..., count]`, tile by tile."""
        ctx.rows, ctx.spans, ctx.dtype = rows, [(s, min(s + tile, count)) for s in range(0, count, tile)], x.dtype
        parts = []
        for span in ctx.spans:
            weight = rows(*span)
            parts.append(x.to(weight.dtype) @ weight.T)
        return torch.cat(parts, -1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Return the gradient of the input."""
        total = None
        for start, stop in ctx.spans:
            weight = ctx.rows(start, stop)
            part = gradient[..., start:stop].to(weight.dtype) @ weight
            total = part if total is None else total + part
        assert total is not None
        return total.to(ctx.dtype), None, None, None
