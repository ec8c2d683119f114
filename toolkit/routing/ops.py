"""Arithmetic that several routers share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from toolkit.errors import CheckpointError

Vectors = NDArray[np.float32]
State = Mapping[str, NDArray[np.float32]]
"""What a router or a kind of features learned, by name."""

BLOCK = 256


def products(x: Any, y: Any) -> Any:
    """Return `x @ y.T`, `[B, N]`, whose columns do not depend on how many rows of `y` follow.

    BLAS rounds products of other shapes in another way, so `y` `[N, H]` is taken in blocks of one size, the last
    padded with zeros. So a new expert changes no bit of the scores of those before it.
    """
    whole = len(y) // BLOCK * BLOCK
    last = np.zeros((1, BLOCK, y.shape[1]), y.dtype)
    last[0, : len(y) - whole] = y[whole:]
    parts = [
        np.matmul(x, blocks.swapaxes(1, 2)).swapaxes(0, 1).reshape(len(x), -1)
        for blocks in (y[:whole].reshape(-1, BLOCK, y.shape[1]), last)
    ]
    return np.concatenate(parts, axis=1)[:, : len(y)]


def normalized(x: Any) -> Any:
    """Return the rows at length 1; rows of zeros stay."""
    lengths = np.linalg.norm(x, axis=1, keepdims=True)
    return x / np.where(lengths > 0, lengths, 1)


def log_softmax(scores: Any) -> Any:
    """Return the logarithms of the shares that the scores of each row, as logits, stand for."""
    shifted = scores - scores.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


def check_width(vectors: Any, fitted: int) -> None:
    """Raise a `CheckpointError` where vectors are of another width than a router was fitted on."""
    if vectors.shape[1] != fitted:
        raise CheckpointError(
            f"the embedding has {vectors.shape[1]} numbers, the router was fitted on {fitted}; fit it anew"
        )


def check_arrays(state: State, shapes: Mapping[str, tuple[int, ...]], *, finite: bool = True) -> None:
    """Check that arrays are there, of these shapes (-1 admits any size) and finite.

    Raises:
        CheckpointError: one is not.
    """
    for name, shape in shapes.items():
        if name not in state:
            raise CheckpointError(f"{name} is missing")
        given = state[name].shape
        if len(given) != len(shape) or any(w not in (-1, g) for w, g in zip(shape, given, strict=True)):
            raise CheckpointError(f"{name} is {list(given)}, expected {[w if w >= 0 else 'any' for w in shape]}")
        if finite and not np.isfinite(state[name]).all():
            raise CheckpointError(f"{name} holds values that are not finite")


def size(state: State, name: str, axis: int = -1) -> int:
    """Return a length of one array, or 0 where it is not there; for `check_arrays`, which then says so."""
    return state[name].shape[axis] if name in state and state[name].ndim else 0


def inside(state: State, name: str) -> dict[str, NDArray[np.float32]]:
    """Return the arrays whose names start with `name.`, without it: the state of a router inside another."""
    return {key[len(name) + 1 :]: value for key, value in state.items() if key.startswith(f"{name}.")}


def within(name: str, state: State) -> dict[str, NDArray[np.float32]]:
    """Return the arrays under `name.`; the inverse of `inside`."""
    return {f"{name}.{key}": value for key, value in state.items()}
