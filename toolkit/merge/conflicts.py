"""Compare what several fine-tunes changed of their base: how much, in which directions, with which signs, at what rank.

Of deltas `d_i = tuned_i - base`, over the elements of a tensor, of a layer or of the whole model:

    norm        sqrt(sum d_i^2); the relative norm divides by the base's norm over the same elements
    cosine      <d_i, d_j> / (|d_i| |d_j|), 0 where one of them is zero
    overlap     of all elements, the share that both deltas change
    conflicts   of the elements that both deltas change, the share where their signs differ
    clashes     of the elements that two deltas or more change, the share where the signs of these do not all agree
    energy      of the squared singular values, the share of the r largest of every matrix, added up over the matrices

Conflicts are what TIES resolves: Yadav et al., "TIES-Merging: Resolving Interference When Merging Models", 2023
(arXiv:2306.01708). Deltas are float32, sums over them float64. An element that is NaN or infinite is reported, and
counts as unchanged.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import sqrt

import numpy as np
from numpy.typing import NDArray

from toolkit.checkpoints.layout import layer_of, role_of
from toolkit.merge.ops import cosines

Doubles = NDArray[np.float64]
Counts = NDArray[np.int64]

OUTSIDE = {"embedding": "embeddings", "norm": "norm", "head": "head"}
"""Role of a tensor outside the layers -> what it is counted as; anything else is `other`."""


@dataclass
class Sums:
    """Sums over the elements of some tensors, for `M` deltas and `R` ranks.

    Attributes:
        count: elements.
        base: sum of the base's squares.
        products: `[M, M]`, inner products of the deltas.
        both: `[M, M]`, elements that both change.
        opposite: `[M, M]`, of these, those whose signs differ.
        shared: elements that two deltas or more change.
        clashing: of these, those where not all signs agree.
        squares: `[M]`, sum of the squared singular values of all matrices.
        leading: `[M, R]`, the part of each matrix's largest ones.
    """

    count: int
    base: float
    products: Doubles
    both: Counts
    opposite: Counts
    shared: int
    clashing: int
    squares: Doubles
    leading: Doubles

    @classmethod
    def zeros(cls, models: int, ranks: int) -> Sums:
        """Return the sums over nothing."""
        pairs = (models, models)
        both, opposite = np.zeros(pairs, np.int64), np.zeros(pairs, np.int64)
        return cls(0, 0.0, np.zeros(pairs), both, opposite, 0, 0, np.zeros(models), np.zeros((models, ranks)))

    def add(self, other: Sums) -> None:
        """Add the sums over other tensors."""
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)

    @property
    def norms(self) -> Doubles:
        """L2 norm of each delta, `[M]`."""
        return np.sqrt(np.diagonal(self.products))

    @property
    def relative_norms(self) -> Doubles:
        """Norm of each delta over the base's, `[M]`; NaN where the base is zero."""
        return self.norms / (sqrt(self.base) or np.nan)

    @property
    def cosines(self) -> Doubles:
        """Cosines between deltas, `[M, M]`."""
        return cosines(self.products)[1]

    @property
    def overlap(self) -> Doubles:
        """Share of all elements that both change, `[M, M]`; on the diagonal the share that each changes."""
        return self.both / max(self.count, 1)

    @property
    def conflicts(self) -> Doubles:
        """Of the elements that both change, the share where their signs differ, `[M, M]`; 0 where there are none."""
        return self.opposite / np.maximum(self.both, 1)

    @property
    def clashes(self) -> float:
        """Of the elements that several change, the share where not all signs agree; 0 where there are none."""
        return self.clashing / max(self.shared, 1)

    @property
    def energy(self) -> Doubles:
        """Share of each delta's energy in the top ranks, `[M, R]`; NaN where no matrix is changed."""
        total = np.where(self.squares > 0, self.squares, np.nan)
        return self.leading / total[:, None]

    def mean_cosine(self) -> float:
        """Return the mean cosine over the pairs of deltas that are not zero; NaN where there is none."""
        changing = np.flatnonzero(self.norms)
        pairs = np.triu_indices(len(changing), 1)
        found = self.cosines[np.ix_(changing, changing)][pairs]
        return float(found.mean()) if len(found) else float("nan")

    def mean_energy(self) -> Doubles:
        """Return the mean share in the top ranks, `[R]`, over the deltas that change a matrix; NaN where none does."""
        changing = self.squares > 0
        return self.energy[changing].sum(axis=0) / (np.count_nonzero(changing) or np.nan)


@dataclass(frozen=True)
class Unusable:
    """A tensor that holds NaN or infinity, in how many elements; `source` is the model, or the base."""

    source: str
    tensor: str
    elements: int


@dataclass(frozen=True)
class Comparison:
    """What was measured.

    Attributes:
        base: what the user called it.
        models: the fine-tunes, likewise; no two are called the same.
        ranks: at which energy was measured; empty if it was not.
        shapes: of the tensors.
        tensors: sums over each tensor, from the first layer to the last.
        unusable: tensors that hold NaN or infinity.
    """

    base: str
    models: Sequence[str]
    ranks: Sequence[int]
    shapes: Mapping[str, tuple[int, ...]]
    tensors: Mapping[str, Sums]
    unusable: Sequence[Unusable]

    @cached_property
    def layers(self) -> dict[str, Sums]:
        """Sums over each layer, and over the embeddings, norms and heads outside the layers."""
        layers: dict[str, Sums] = {}
        for name, sums in self.tensors.items():
            layers.setdefault(part_of(name), self._nothing()).add(sums)
        return layers

    @cached_property
    def total(self) -> Sums:
        """Sums over the whole model."""
        total = self._nothing()
        for sums in self.tensors.values():
            total.add(sums)
        return total

    def _nothing(self) -> Sums:
        return Sums.zeros(len(self.models), len(self.ranks))


def part_of(name: str) -> str:
    """Name the layer of a tensor, such as `model.layers.3`, or what it belongs to outside the layers."""
    found = layer_of(name)
    return f"{found[0]}.{found[1]}" if found else OUTSIDE.get(role_of(name), "other")
