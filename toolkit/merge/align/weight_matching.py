"""Weight matching: permute the units of a model so that its weights come as near to another's as they can.

Ainsworth, Hayase and Srinivasa, "Git Re-Basin: Merging Models modulo Permutation Symmetries" (2022, arXiv:2209.04836);
why it works: Ito, Yamada and Kumagai, "Analysis of Linear Mode Connectivity via Permutation-Based Weight Matching"
(2024, arXiv:2402.04051): it turns the singular vectors of large singular values towards each other; distances hardly
shrink, and singular values not at all.

Sought are the permutations `P` that maximise `sum <reference, P(other)>` over all tensors, which is to minimise the
squared distance. With all groups but one held, the best permutation of that group solves a linear assignment problem
whose gains are inner products of what its units hold in all tensors. Groups take turns in random order until none can
be improved. Query heads that share a key-value head are assigned for every pair of key-value heads first; then the
key-value heads, by what each pair is worth: together that is the best of all permutations of the attention.

The descent starts from what the vocabulary tells: embeddings, head and norms of both models have the same tokens in the
same order, so they fix the residual stream before anything else is known, and the residual stream fixes the rest. Where
that is no better than the order as it is, as between models that share a base, it starts from the latter.

Several models are aligned to one common reference, each by itself, so their order means nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from typing import Any

import numpy as np
from numpy.typing import NDArray

from toolkit.checkpoints.deltas import chunks
from toolkit.checkpoints.dtypes import Floats
from toolkit.checkpoints.reader import Checkpoint
from toolkit.errors import CheckpointError, UnsupportedError
from toolkit.merge.align.axes import RESIDUAL, Group, Permutation, Symmetry, symmetry_of
from toolkit.merge.align.view import PermutedCheckpoint
from toolkit.progress import Progress, track

SWEEPS = 50
"""Most turns of all groups; a handful is usual."""

BLOCK = 1 << 22
"""Elements of a tensor that are multiplied at a time where its rows need not all be there."""

_LEAST_GAIN = 1e-6
"""Smallest relative improvement; smaller ones are roundings of float32 products."""

Gains = Mapping[int, NDArray[np.float64]]
"""Inner products of the reference's units (rows) and the other model's: of single units under 1, and of what
`shared` units have in common under `shared`."""


@dataclass(frozen=True)
class Alignment:
    """A model whose units sit where a reference has the same ones.

    Attributes:
        view: the aligned model; it reads from the model as it was.
        permutations: by group: `aligned[i] = model[permutation[i]]`.
        objective: `sum <reference, model>` over all tensors as the model was, after the start, and after
            each sweep; never falls.
        distances: Frobenius norm of `reference - model`, before and after, over that of the reference.
    """

    view: PermutedCheckpoint
    permutations: Mapping[str, Permutation]
    objective: Sequence[float]
    distances: tuple[float, float]

    @property
    def moved(self) -> dict[str, float]:
        """Share of units that moved: of the residual stream, of all MLPs, of all attention heads."""
        found: dict[str, list[NDArray[np.bool_]]] = {}
        for name, permutation in self.permutations.items():
            kind = name.rpartition(".")[2]
            found.setdefault(kind, []).append(permutation != np.arange(len(permutation)))
        return {kind: float(np.concatenate(flags).mean()) for kind, flags in found.items()}


def align(
    reference: Checkpoint,
    other: Checkpoint,
    *,
    seed: int = 0,
    sweeps: int = SWEEPS,
    residual: bool = True,
    quiet: bool = True,
) -> Alignment:
    """Align a model to a reference by weight matching.

    In memory are at most two matrices of a layer, and one square matrix of as many rows as a layer has hidden units.

    Args:
        reference: stays as it is.
        other: of the same architecture, sizes and vocabulary.
        seed: of the order in which groups take turns.
        sweeps: most turns of all groups.
        residual: also permute the residual stream; without it every layer is solved by itself, exactly.
        quiet: show no progress.

    Raises:
        UnsupportedError: an architecture that is not known, or models that differ in more than their weights.
        CheckpointError: NaN or infinity in the weights.
    """
    symmetry = common_symmetry(reference, other)
    matching = _Matching(reference, other, symmetry if residual else symmetry.without(RESIDUAL))
    steps = len(matching.symmetry.groups)
    with track("aligning", (sweeps + 1) * steps, unit="groups", quiet=quiet) as progress:
        objective = [matching.objective, matching.start(progress)]
        generator = np.random.default_rng(seed)
        for count in range(1, sweeps + 1):
            before = objective[-1]
            progress.note(f"sweep {count}")
            objective.append(matching.sweep(generator, progress))
            if objective[-1] == before:
                break
    view = matching.view()
    return Alignment(view, matching.permutations, objective, (matching.distance, compare(reference, view)[1]))


def common_symmetry(reference: Checkpoint, other: Checkpoint) -> Symmetry:
    """Return the axes of all tensors of two models; an output head that only one of them stores is among them.

    Raises:
        UnsupportedError: an architecture that is not known, or models that differ in more than their weights.
    """
    symmetry, second = symmetry_of(reference), symmetry_of(other)
    pair = f"{other.source} cannot be aligned to {reference.source}"
    for name in {**reference.tensors, **other.tensors}:
        lacking = next((model for model in (reference, other) if not model.has(name)), None)
        if lacking:
            raise UnsupportedError(f"{pair}: {lacking.source} lacks {name}")
        given, wanted = other.info(name).shape, reference.info(name).shape
        axes = symmetry.axes.get(name), second.axes.get(name)
        if given != wanted or (None not in axes and axes[0] != axes[1]):
            what = f"{list(given)}, not {list(wanted)}" if given != wanted else "cut into other heads"
            raise UnsupportedError(f"{pair}: {name} is {what}")
    return Symmetry(symmetry.groups, {**symmetry.axes, **second.axes})


def compare(reference: Checkpoint, other: Checkpoint) -> tuple[float, float]:
    """Return `sum <reference, other>` over all tensors, and the relative distance of two models with the same ones."""
    inner = norm = distance = 0.0
    for name in {**reference.tensors, **other.tensors}:
        if not reference.info(name).dtype.floating or not other.info(name).dtype.floating:
            continue
        for a, b in _blocks(reference, other, name):
            x, y = a.astype(np.float64).reshape(-1), b.astype(np.float64).reshape(-1)
            inner += float(x @ y)
            norm += float(x @ x)
            distance += float(np.square(x - y).sum())
    return inner, sqrt(distance / norm) if norm else 0.0


class _Matching:
    """The state of a descent.

    Attributes:
        permutations: of every group, as good as found so far.
        objective: what they are worth.
        distance: of the models before.
    """

    def __init__(self, reference: Checkpoint, other: Checkpoint, symmetry: Symmetry) -> None:
        self.reference, self.other, self.symmetry = reference, other, symmetry
        self.permutations = {name: group.identity() for name, group in symmetry.groups.items()}
        self.objective, self.distance = compare(reference, other)

    def view(self, without: str | None = None) -> PermutedCheckpoint:
        """Return the model as permuted so far, one group left out."""
        moved = {name: found for name, found in self.permutations.items() if name != without}
        return PermutedCheckpoint(self.other, self.symmetry, moved)

    def start(self, progress: Progress) -> float:
        """Find permutations from the tensors that only the vocabulary orders; keep them if they are better."""
        if RESIDUAL not in self.symmetry.groups:
            return self.objective
        before = dict(self.permutations)
        settled: set[str] = set()
        for name, group in self.symmetry.groups.items():  # the residual stream comes first
            self.permutations[name] = solve(group, self.gains(group, settled))
            settled.add(name)
            progress.advance()
        reached = compare(self.reference, self.view())[0]
        if reached > self.objective:
            self.objective = reached
        else:
            self.permutations = before
        return self.objective

    def sweep(self, generator: np.random.Generator, progress: Progress) -> float:
        """Give every group its turn; return the objective."""
        names = list(self.symmetry.groups)
        for index in generator.permutation(len(names)):
            group = self.symmetry.groups[names[index]]
            gains = self.gains(group)
            found, held = solve(group, gains), self.permutations[group.name]
            gain = worth(group, gains, found) - worth(group, gains, held)
            if gain > _LEAST_GAIN * sum(np.abs(matrix).max(1, initial=0).sum() for matrix in gains.values()):
                self.permutations[group.name] = found
                self.objective += gain
            progress.advance()
        return self.objective

    def gains(self, group: Group, settled: set[str] | None = None) -> Gains:
        """Return what it is worth to put each of the other model's units in each place of the reference.

        Args:
            group: whose units are meant.
            settled: leave out the tensors that another group permutes, unless it is one of these.
        """
        found = {per: np.zeros((group.size // per,) * 2) for per in (1, group.shared)}
        view = self.view(group.name)
        for name, dimension, axis in self.symmetry.places(group):
            others = {a.group.name for a in self.symmetry.axes[name] if a and a.group != group}
            if settled is not None and not others <= settled:
                continue
            for a, b in _blocks(self.reference, view, name, whole=dimension == 0):
                a, b = (a, b) if dimension == 0 else (a.T, b.T)
                for part, start, stop in axis.stretches():
                    units = group.size // part.per
                    products = a[start:stop].reshape(units, -1) @ b[start:stop].reshape(units, -1).T
                    if not np.isfinite(products).all():
                        raise CheckpointError(f"{name}: NaN or infinity in {self._where(name)}; it cannot be aligned")
                    found[part.per] += products
        return found

    def _where(self, name: str) -> str:
        for a, _ in _blocks(self.reference, self.reference, name):
            if not np.isfinite(a).all():
                return self.reference.source
        return self.other.source


def solve(group: Group, gains: Gains) -> Permutation:
    """Return the best permutation of a group."""
    if group.shared == 1:
        return _assign(gains[1])
    shared, values = group.shared, gains[group.shared].copy()
    inside: dict[tuple[int, int], Permutation] = {}
    for i, j in np.ndindex(values.shape):
        pairs = gains[1][i * shared : (i + 1) * shared, j * shared : (j + 1) * shared]
        inside[i, j] = _assign(pairs)
        values[i, j] += pairs[np.arange(shared), inside[i, j]].sum()
    return np.concatenate([j * shared + inside[i, int(j)] for i, j in enumerate(_assign(values))])


def worth(group: Group, gains: Gains, permutation: Permutation) -> float:
    """Return what a permutation of a group is worth."""
    total = 0.0
    for per in {1, group.shared}:
        blocks = permutation[::per] // per
        total += float(gains[per][np.arange(len(blocks)), blocks].sum())
    return total


def _assign(gains: NDArray[Any]) -> Permutation:
    """Return for every row the column that it is given, so that the sum is largest."""
    from scipy.optimize import linear_sum_assignment

    return linear_sum_assignment(gains, maximize=True)[1].astype(np.int64)


def _blocks(
    reference: Checkpoint, other: Checkpoint, name: str, *, whole: bool = False
) -> Iterator[tuple[Floats, Floats]]:
    """Yield the same rows of a tensor of both models, `[R, N]` each; a vector is one column.

    Args:
        reference: first model.
        other: second model.
        name: of the tensor.
        whole: yield all rows at once.
    """
    shape = reference.info(name).shape
    width = shape[-1] if len(shape) > 1 else 1
    pending: list[tuple[int, int]] = []
    ranges = list(chunks(shape, whole_rows=len(shape) > 1))
    for index, (start, stop) in enumerate(ranges):
        pending.append((start, stop))
        is_full = not whole and stop - pending[0][0] >= BLOCK and len(shape) > 1
        if is_full or index == len(ranges) - 1:
            yield _read(reference, name, pending).reshape(-1, width), _read(other, name, pending).reshape(-1, width)
            pending = []


def _read(checkpoint: Checkpoint, name: str, ranges: Sequence[tuple[int, int]]) -> Floats:
    first = ranges[0][0]
    out = np.empty(ranges[-1][1] - first, np.float32)
    for start, stop in ranges:
        checkpoint.read(name, start, stop, out[start - first : stop - first])
    return out
