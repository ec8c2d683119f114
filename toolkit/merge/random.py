"""Random numbers that depend on a key and a position alone, not on who draws them, when, or how many at a time.

A tensor is cut into blocks of 65,536 elements. A hash of (seed, tensor name, model, block) gives two keys; an element's
number is an integer hash of `place * odd key + other key`, where the place is that of the element in its block.
So a merge with random masks has the same bytes for any number of threads, any chunk size, and whatever else is
merged.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import numpy as np
from numpy.typing import NDArray

_BLOCK = 1 << 16
_PLACES = np.arange(_BLOCK, dtype=np.uint32)
_HALF, _MIDDLE = np.uint32(16), np.uint32(15)
_FIRST, _SECOND = np.uint32(0x7FEB352D), np.uint32(0x846CA68B)


class _Scratch(threading.local):
    """Buffers of one thread: fresh memory for each block costs more than the hash."""

    def __init__(self) -> None:
        self.drawn = np.empty(_BLOCK, np.uint32)
        self.shifted = np.empty(_BLOCK, np.uint32)


_SCRATCH = _Scratch()


@dataclass(frozen=True)
class Draws:
    """The random numbers of one tensor of one model.

    Attributes:
        seed: of the merge.
        tensor: name.
        model: position among the inputs.
    """

    seed: int
    tensor: str
    model: int

    def bits(self, start: int, stop: int, out: NDArray[np.uint32] | None = None) -> NDArray[np.uint32]:
        """Return 32 uniform bits for each of the elements `start` to `stop`, in `out` where it is given."""
        out = np.empty(stop - start, np.uint32) if out is None else out
        if not isinstance(out, np.ndarray):
            np.copyto(out, self._draw_all(start, stop, out))
            return out
        for block, first, last in _blocks(start, stop):
            self._draw(block, first, last, out[first - start : last - start])
        return out

    def below(self, probability: float, start: int, stop: int, like: NDArray[Any] = _PLACES) -> NDArray[np.bool_]:
        """Return for each of the elements `start` to `stop` whether its number in [0, 1) is below a probability.

        The answers are an array `like` another one: on its device.
        """
        threshold = round(probability * 2**32)
        if threshold >= 1 << 32:
            return np.full(stop - start, True, np.bool_, like=like)
        if not isinstance(like, np.ndarray):
            return np.less(self._draw_all(start, stop, like), np.uint32(threshold))
        out = np.empty(stop - start, np.bool_)
        for block, first, last in _blocks(start, stop):
            drawn = _SCRATCH.drawn[: last - first]
            self._draw(block, first, last, drawn)
            np.less(drawn, np.uint32(threshold), out=out[first - start : last - start])
        return out

    def _draw(self, block: int, first: int, last: int, out: NDArray[np.uint32]) -> None:
        """Write the bits of the elements `first` to `last`, all of one block."""
        stride, offset = self._keys(block)
        np.multiply(_PLACES[first - block * _BLOCK : last - block * _BLOCK], stride, out=out)
        np.add(out, offset, out=out)
        _mix(out, _SCRATCH.shifted[: len(out)])

    def _draw_all(self, start: int, stop: int, like: NDArray[Any]) -> NDArray[np.uint32]:
        """Return the bits of the elements `start` to `stop`, all blocks at once: a device has no cache to stay in."""
        first = start // _BLOCK
        keys = np.array([self._keys(block) for block in range(first, -(-stop // _BLOCK))])
        words = np.arange(_BLOCK, dtype=np.uint32, like=like) * keys[:, :1] + keys[:, 1:]
        _mix(words, np.empty_like(words))
        return words.reshape(-1)[start - first * _BLOCK : stop - first * _BLOCK]

    def _keys(self, block: int) -> tuple[np.uint32, np.uint32]:
        text = f"{self.seed}\0{self.tensor}\0{self.model}\0{block}"
        digest = np.frombuffer(blake2b(text.encode(), digest_size=8).digest(), np.uint32)
        return digest[0] | np.uint32(1), digest[1]


def _blocks(start: int, stop: int) -> Iterator[tuple[int, int, int]]:
    """Yield `(block, first, last)`, the part of each block that lies in `start..stop`."""
    for block in range(start // _BLOCK, -(-stop // _BLOCK)):
        yield block, max(start, block * _BLOCK), min(stop, (block + 1) * _BLOCK)


def _mix(x: NDArray[np.uint32], shifted: NDArray[np.uint32]) -> None:
    """Hash 32 bits to 32 bits, one to one, in place; `shifted` is room to work in.

    The constants are of Chris Wellons' search, "lowbias32".
    """
    np.right_shift(x, _HALF, out=shifted)
    np.bitwise_xor(x, shifted, out=x)
    np.multiply(x, _FIRST, out=x)
    np.right_shift(x, _MIDDLE, out=shifted)
    np.bitwise_xor(x, shifted, out=x)
    np.multiply(x, _SECOND, out=x)
    np.right_shift(x, _HALF, out=shifted)
    np.bitwise_xor(x, shifted, out=x)
