"""Read the deltas of several fine-tunes of one base, and measure how they compare; see `toolkit.merge.conflicts`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import combinations_with_replacement
from typing import Any

import numpy as np
from numpy.typing import NDArray

from toolkit.checkpoints.adapters import LowRank
from toolkit.checkpoints.compressed import CompressedDelta
from toolkit.checkpoints.deltas import AdapterDelta, Delta, DenseDelta, chunks
from toolkit.checkpoints.dtypes import Floats
from toolkit.checkpoints.layout import layer_of, role_of
from toolkit.checkpoints.reader import Checkpoint
from toolkit.merge.conflicts import Comparison, Counts, Doubles, Sums, Unusable
from toolkit.merge.stream import Scratch
from toolkit.merge.svd import SMALL, leading, singular_values
from toolkit.progress import track

_DEPTHS = {"embedding": 0, "norm": 3, "head": 4}
"""Order of roles outside the layers, which come at 1; anything else comes at 2."""


def compare(base: Checkpoint, deltas: Sequence[Delta], ranks: Iterable[int] = (), *, quiet: bool = False) -> Comparison:
    """Measure deltas of one base, tensor by tensor.

    Memory holds a slice of every model, and one matrix where there are ranks. Tensors that are not of floating-point
    numbers are left out. The energy of low-rank pairs comes from their factors; that of a matrix of more than a million
    elements from subspace iteration, see `toolkit.merge.svd`, within about a thousandth.

    Args:
        base: of all deltas.
        deltas: at least one.
        ranks: at which to measure the energy, each 1 or more; without any, no singular values are computed.
        quiet: show no progress.
    """
    ordered = tuple(sorted(set(ranks)))
    names = _names(base, deltas)
    models = _unique([delta.source for delta in deltas])
    meter = _Meter(base, deltas, ordered)
    tensors: dict[str, Sums] = {}
    unusable: list[Unusable] = []
    total = sum(meter.nbytes(name) for name in names)
    with (
        track("comparing deltas", total, unit="B", quiet=quiet) as progress,
        np.errstate(over="ignore", invalid="ignore"),
    ):
        for name in names:
            tensors[name], bad = meter.measure(name)
            sources = [base.source, *models]
            unusable += [Unusable(s, name, int(n)) for s, n in zip(sources, bad, strict=True) if n]
            progress.advance(meter.nbytes(name))
    shapes = {name: base.info(name).shape for name in names}
    return Comparison(base.source, models, ordered, shapes, tensors, unusable)


def _names(base: Checkpoint, deltas: Sequence[Delta]) -> list[str]:
    """Return the tensors to measure: the base's, and heads that it ties and a fine-tune does not; in order of depth."""
    names = dict.fromkeys(base.tensors)
    for delta in deltas:
        if isinstance(delta, DenseDelta):
            names |= dict.fromkeys(delta.tuned.tensors)
        elif isinstance(delta, AdapterDelta):
            names |= dict.fromkeys(sorted(delta.adapter.touched))
        elif isinstance(delta, CompressedDelta):
            names |= dict.fromkeys(delta.parts)
    stacks = list(dict.fromkeys(found[0] for found in map(layer_of, names) if found))

    def depth(name: str) -> tuple[int, int, int]:
        found = layer_of(name)
        return (1, stacks.index(found[0]), found[1]) if found else (_DEPTHS.get(role_of(name), 2), 0, 0)

    return sorted((name for name in names if base.info(name).dtype.floating), key=depth)


def _unique(names: Sequence[str]) -> list[str]:
    """Number the names that occur more than once."""
    seen: dict[str, int] = {}
    found: list[str] = []
    for name in names:
        seen[name] = seen.get(name, 0) + 1
        found.append(f"{name} ({seen[name]})" if seen[name] > 1 else name)
    return found


class _Meter:
    """Measures tensors one after another, in buffers that it keeps."""

    def __init__(self, base: Checkpoint, deltas: Sequence[Delta], ranks: tuple[int, ...]) -> None:
        self.base, self.deltas, self.ranks = base, deltas, ranks
        self._scratch = Scratch()

    def nbytes(self, name: str) -> int:
        """Return the bytes to read for a tensor; singular values need them once more."""
        passes = 2 if self.ranks and len(self.base.info(name).shape) > 1 else 1
        changed = sum(delta.nbytes(name) for delta in self.deltas if delta.touches(name))
        return self.base.info(name).nbytes + passes * changed

    def measure(self, name: str) -> tuple[Sums, Counts]:
        """Return the sums over a tensor, and how many elements of the base `[0]` and of each model are not finite."""
        sums = Sums.zeros(len(self.deltas), len(self.ranks))
        bad = np.zeros(len(self.deltas) + 1, np.int64)
        changing = [i for i, delta in enumerate(self.deltas) if delta.touches(name)]
        for base, x in self._slices(name, changing):
            finite = np.isfinite(base)
            bad[0] += _drop(base, finite)
            for row, model in zip(x, changing, strict=True):
                bad[model + 1] += _drop(row, np.isfinite(row), finite)
            wide = base.astype(np.float64)
            sums.count += len(base)
            sums.base += float(wide @ wide)
            _add_slice(sums, changing, x)
        if self.ranks and len(self.base.info(name).shape) > 1:
            for model in changing:
                sums.squares[model], sums.leading[model] = self._energy(name, model)
        return sums, bad

    def _slices(self, name: str, changing: Sequence[int]) -> Iterator[tuple[Floats, Floats]]:
        """Yield the base `[N]` and the deltas `[K, N]` that change the tensor, in memory that is overwritten."""
        for start, stop in chunks(self.base.info(name).shape):
            base, x = self._scratch.base(stop - start), self._scratch.stack(len(changing), stop - start)
            self.base.read(name, start, stop, base)
            for row, model in zip(x, changing, strict=True):
                self.deltas[model].read(name, start, stop, base, row)
            yield base, x

    def _energy(self, name: str, model: int) -> tuple[float, Doubles]:
        """Return the sum of the squared singular values of a delta, and those of the top ranks, `[R]`."""
        pair = _pair(self.deltas[model], name)
        if pair is not None:
            return _top(_values_of_pair(pair), 0.0, self.ranks)
        total, top = 0.0, np.zeros(len(self.ranks))
        for matrix in self._matrices(name, model):
            if matrix.any():
                energy, found = _top(*_values(matrix, self.ranks[-1]), self.ranks)
                total, top = total + energy, top + found
        return total, top

    def _matrices(self, name: str, model: int) -> Iterator[Floats]:
        """Yield the matrices of a delta, each in the same memory; leading dimensions of a tensor count them."""
        matrix = np.empty(self.base.info(name).shape[-2:], np.float32)
        flat, filled = matrix.reshape(-1), 0
        for _, x in self._slices(name, [model]):
            row = x[0]
            _drop(row, np.isfinite(row))
            while len(row):
                taken = row[: flat.size - filled]
                flat[filled : filled + len(taken)] = taken
                row, filled = row[len(taken) :], filled + len(taken)
                if filled == flat.size:
                    yield matrix
                    filled = 0


def _drop(x: Floats, finite: NDArray[np.bool_], among: NDArray[np.bool_] | None = None) -> int:
    """Zero what is not finite; return how many of `among` that is."""
    if finite.all():
        return 0
    x[~finite] = 0
    return int(np.count_nonzero(~finite if among is None else ~finite & among))


def _add_slice(sums: Sums, changing: Sequence[int], x: Floats) -> None:
    """Add a slice `[K, N]` of the deltas `changing`; `N` is less than 2^24, so that float32 counts are exact."""
    wide, signs = x.astype(np.float64), np.sign(x)
    changed = np.abs(signs)
    for a, b in combinations_with_replacement(range(len(changing)), 2):
        i, j = changing[a], changing[b]
        both = int(changed[a] @ changed[b])
        opposite = (both - int(signs[a] @ signs[b])) // 2
        product = float(wide[a] @ wide[b])
        for at in {(i, j), (j, i)}:
            sums.products[at] += product
            sums.both[at] += both
            sums.opposite[at] += opposite
    if len(changing) > 1:
        changes = changed.sum(axis=0)
        sums.shared += int(np.count_nonzero(changes > 1))
        sums.clashing += int(np.count_nonzero(np.abs(signs.sum(axis=0)) < changes))


def _pair(delta: Delta, name: str) -> LowRank | None:
    """Return the low-rank pair that is the whole change of a tensor, if one is, and is finite."""
    pair = None
    if isinstance(delta, AdapterDelta) and name in delta.adapter.targets and name not in delta.adapter.whole:
        pair = delta.adapter.low_rank(delta.adapter.targets[name])
    elif isinstance(delta, CompressedDelta) and "rows" in delta.parts.get(name, {}):
        parts = delta.parts[name]
        pair = LowRank(_read(delta.store, parts["rows"]), _read(delta.store, parts["cols"]), 1.0)
    if pair is None or pair.magnitude is not None or not pair.rank:
        return None
    return pair if np.isfinite(pair.rows).all() and np.isfinite(pair.cols).all() else None


def _read(store: Checkpoint, name: str) -> Floats:
    info = store.info(name)
    out = np.empty(info.count, np.float32)
    store.read(name, 0, info.count, out)
    return out.reshape(info.shape)


def _values_of_pair(pair: LowRank) -> NDArray[Any]:
    """Return the singular values of `scale * rows @ cols` that can be other than 0, from the factors alone."""
    rows: NDArray[Any] = np.linalg.qr(pair.rows.astype(np.float64), mode="r")  # pyright: ignore[reportAssignmentType]
    cols: NDArray[Any] = np.linalg.qr(pair.cols.T.astype(np.float64), mode="r")  # pyright: ignore[reportAssignmentType]
    return np.linalg.svd(pair.scale * (rows @ cols.T), compute_uv=False)


def _values(matrix: Floats, rank: int) -> tuple[NDArray[Any], float]:
    """Return singular values of a matrix, at least the `rank` largest, and the sum of the squares of the others."""
    if matrix.size <= SMALL:
        return singular_values(matrix), 0.0
    _, values, _, rest = leading(matrix, rank)
    return values, rest**2


def _top(values: NDArray[Any], rest: float, ranks: Sequence[int]) -> tuple[float, Doubles]:
    """Return the sum of all squared singular values, and of as many of the largest as each of `ranks` says."""
    kept = np.cumsum(np.square(values, dtype=np.float64))
    return float(kept[-1]) + rest, kept[np.minimum(ranks, len(kept)) - 1]
