"""Hashed tf-idf: vectors of the words and letters of a text, made without any model.

Words, pairs of neighbouring words, shapes of words and triples of characters are counted in buckets of a hash
(Weinberger et al., "Feature hashing for large scale multitask learning", 2009, without its signs), damped by a
logarithm, weighted by how few texts have them, and brought to length 1. By default the vectors are then shortened to
their leading principal directions (latent semantic analysis).
"""

from __future__ import annotations

import re
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field
from scipy import sparse

from toolkit.routing.ops import State, Vectors, check_arrays, size
from toolkit.specs import Spec

_TOKEN = re.compile(r"\w+|[^\w\s]")
_LOWER, _UPPER, _DIGITS = re.compile(r"[^\W\d_A-Z]+"), re.compile(r"[A-Z]+"), re.compile(r"\d+")
OVERSAMPLED = 16
"""Directions more than wanted that the randomised SVD takes along."""


class WordsSpec(Spec):
    """Hashed tf-idf.

    Attributes:
        buckets: of the hash.
        dimensions: principal directions that are kept; none leaves the counts as they are, sparse, which `linear`
            alone takes.
        rows: texts that the directions are found on, at most; they are drawn at random.
    """

    buckets: Annotated[int, Field(ge=16, le=2**20)] = 2**14
    dimensions: Annotated[int, Field(ge=1)] | None = 256
    rows: Annotated[int, Field(ge=1)] = 10_000


def terms(text: str) -> Iterator[str]:
    """Yield what is counted: words, pairs and shapes of words, triples of characters."""
    tokens = _TOKEN.findall(text)
    words = ["\n", *(token.lower() for token in tokens), "\n"]
    yield from words[1:-1]
    yield from map(" ".join, pairwise(words))
    for token in tokens:
        yield "\t" + _DIGITS.sub("0", _UPPER.sub("A", _LOWER.sub("a", token)))
    padded = f" {text} "
    for at in range(len(padded) - 2):
        yield "\r" + padded[at : at + 3]


def count(texts: Sequence[str], buckets: int) -> sparse.csr_array:
    """Return `[len(texts), buckets]` float32: one plus the logarithm of each bucket's count, 0 where it is empty."""
    places: list[int] = []
    counts: list[int] = []
    ends = [0]
    for text in texts:
        found = Counter(zlib.crc32(term.encode("utf-8", "replace")) % buckets for term in terms(text))
        places += found.keys()
        counts += found.values()
        ends.append(len(places))
    values = 1 + np.log(np.array(counts, np.float32))
    return sparse.csr_array((values, np.array(places, np.int64), np.array(ends, np.int64)), shape=(len(texts), buckets))


def fit(texts: Sequence[str], spec: WordsSpec) -> dict[str, Vectors]:
    """Learn how rare each bucket is, and the principal directions."""
    counts = count(texts, spec.buckets)
    having = np.bincount(counts.indices, minlength=spec.buckets)
    state = {"rarity": (np.log((1 + len(texts)) / (1 + having)) + 1).astype(np.float32)}
    if spec.dimensions is not None:
        rng = np.random.default_rng(0)
        rows = np.sort(rng.permutation(len(texts))[: spec.rows])
        state["directions"] = _directions(_weighted(counts[rows], state["rarity"]), spec.dimensions, rng)
    return state


def vectors(texts: Sequence[str], state: State) -> Any:
    """Return `[len(texts), dimensions]` float32, or sparse `[len(texts), buckets]` where no directions are kept."""
    weighted = _weighted(count(texts, state["rarity"].size), state["rarity"])
    return weighted @ state["directions"] if "directions" in state else weighted


def check(state: State, spec: WordsSpec) -> None:
    """Raise a `CheckpointError` where a state is not one that `fit` returns."""
    shapes: dict[str, tuple[int, ...]] = {"rarity": (spec.buckets,)}
    if spec.dimensions is not None:
        shapes["directions"] = (spec.buckets, size(state, "directions"))
    check_arrays(state, shapes)


def _weighted(counts: sparse.csr_array, rarity: NDArray[np.float32]) -> sparse.csr_array:
    """Weight by rarity and bring rows to length 1."""
    shape: tuple[int, int] = counts.shape  # pyright: ignore[reportAssignmentType]  # scipy says it may be anything
    values = counts.data * rarity[counts.indices]
    rows = np.repeat(np.arange(shape[0]), np.diff(counts.indptr))
    lengths = np.sqrt(np.bincount(rows, values.astype(np.float64) ** 2, minlength=shape[0]))
    values = (values / lengths[rows]).astype(np.float32)
    return sparse.csr_array((values, counts.indices, counts.indptr), shape=shape)


def _directions(x: sparse.csr_array, dimensions: int, rng: np.random.Generator) -> Vectors:
    """Return `[buckets, dimensions]`, the leading right singular vectors, by subspace iteration."""
    shape: tuple[int, int] = x.shape  # pyright: ignore[reportAssignmentType]  # likewise
    width = min(dimensions + OVERSAMPLED, *shape)
    basis = x.T @ rng.standard_normal((shape[0], width)).astype(np.float32)
    for _ in range(3):
        basis = x.T @ (x @ np.linalg.qr(basis)[0])
    basis = np.linalg.qr(basis)[0]
    _, turned = np.linalg.eigh(((x @ basis).T @ (x @ basis)).astype(np.float64))
    return np.ascontiguousarray((basis @ turned[:, ::-1][:, :dimensions]).astype(np.float32))
