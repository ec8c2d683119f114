"""Write what fine-tunes changed of their base as a folder of compressed deltas: masks, signs, or low-rank pairs.

Masks: Wang et al., "Localizing Task Information for Improved Model Merging and Compression", 2024 (arXiv:2405.07813).
The multi-task vector is the plain sum of the changes; the mask of a fine-tune keeps an element where
`|change| > lambda * |vector - change|`. At `lambda` 1 the rebuilt weights have the least squared error that any mask
gives; smaller values keep more. The paper picks each task's among 0.2 to 0.6 by its validation accuracy.

Signs: Liu et al., "BitDelta: Your Fine-Tune May Only Be Worth One Bit", 2024 (arXiv:2402.10193), without its
distillation. The scale is the mean absolute change, which is the least-squares optimum for the signs of the change.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from toolkit.checkpoints.compressed import compressed_writer, pack_bits, packed_bytes, part_info, part_name
from toolkit.checkpoints.deltas import chunks
from toolkit.checkpoints.dtypes import DTYPES, Bytes, DType, Floats, decode, encode
from toolkit.checkpoints.headers import TensorInfo
from toolkit.checkpoints.writer import WeightsWriter
from toolkit.errors import UnsupportedError
from toolkit.merge.changes import Changes, Key
from toolkit.merge.lowrank import factor
from toolkit.merge.svd import rank_for_energy, ranks_for_budget, singular_values
from toolkit.progress import Progress
from toolkit.tables import human_bytes

BITS = DTYPES["U8"]
SCALES = DTYPES["F32"]


@dataclass(frozen=True)
class RankRule:
    """How many singular values of each matrix are kept; exactly one of these.

    Attributes:
        rank: that many.
        energy: share of the squared Frobenius norm.
        budget: bytes of all that is written, spread so that the total squared error is least.
    """

    rank: int | None = None
    energy: float | None = None
    budget: int | None = None

    def apply(
        self, changes: Changes, keys: Iterable[Key], dtype: DType, spent: int, progress: Progress
    ) -> dict[Key, int]:
        """Choose the rank of every matrix; those of rank 0 are left out.

        Args:
            changes: of the fine-tunes.
            keys: of the matrices.
            dtype: of the factors.
            spent: bytes of the budget that other tensors take.
            progress: counts the bytes of the matrices, where their singular values are needed.

        Raises:
            UnsupportedError: a budget that `spent` exceeds.
        """
        shapes = {key: changes.shape(key[0]) for key in keys}
        if self.rank is not None:
            return {key: min(self.rank, *shape) for key, shape in shapes.items()}
        if self.budget is not None and spent > self.budget:
            given, needed = human_bytes(self.budget), human_bytes(spent)
            raise UnsupportedError(f"a budget of {given} is less than the {needed} of the tensors that are kept whole")
        values = {}
        for key in shapes:
            values[key] = singular_values(changes.matrix(*key))
            progress.advance(changes.jobs[key[0]].read_bytes)
        if self.energy is not None:
            ranks = {key: rank_for_energy(found, self.energy) for key, found in values.items()}
        else:
            assert self.budget is not None
            costs = {key: dtype.nbytes(sum(shape)) for key, shape in shapes.items()}
            ranks = ranks_for_budget(values, costs, self.budget - spent)
        return {key: rank for key, rank in ranks.items() if rank}


@dataclass(frozen=True)
class PairPlace:
    """Where the pair of a matrix is written; `transposed` stores both factors so."""

    rows: str
    cols: str
    transposed: bool = False

    def infos(self, shape: tuple[int, ...], rank: int, dtype: DType) -> list[TensorInfo]:
        """Return the header entries of both factors."""
        rows, cols = (shape[0], rank), (rank, shape[1])
        if self.transposed:
            rows, cols = rows[::-1], cols[::-1]
        return [TensorInfo(self.rows, dtype, rows), TensorInfo(self.cols, dtype, cols)]

    def write(self, writer: WeightsWriter, matrix: Floats, rank: int) -> None:
        """Factor a matrix and write its pair."""
        pair, _ = factor(matrix, rank, self.transposed)
        for name, values in ((self.rows, pair.rows), (self.cols, pair.cols)):
            stored = np.ascontiguousarray(values.T if self.transposed else values).reshape(-1)
            writer.write(name, 0, encode(stored, writer.placed[name].dtype))


@dataclass(frozen=True)
class Compression:
    """What a folder of compressed deltas will hold.

    Attributes:
        kind: `mask`, `bit` or `svd`.
        parts: header entries of all parts.
        jobs: tensor -> what writes its parts, given the writer.
        compressed: tensors and fine-tunes that are held approximately.
        settings: for readers of the config.
    """

    kind: str
    parts: list[TensorInfo] = field(default_factory=list)
    jobs: dict[str, list[Callable[[WeightsWriter], None]]] = field(default_factory=dict)
    compressed: list[Key] = field(default_factory=list)
    settings: dict[str, object] = field(default_factory=dict)

    def add(self, name: str, parts: Iterable[TensorInfo], write: Callable[[WeightsWriter], None]) -> None:
        """Add parts of a tensor, and what writes them."""
        self.parts.extend(parts)
        self.jobs.setdefault(name, []).append(write)

    def write(self, folder: Path, changes: Changes, progress: Progress) -> None:
        """Write the folder, tensor by tensor."""
        with compressed_writer(
            folder,
            self.parts,
            kind=self.kind,
            base_model=changes.base.source,
            tasks=changes.sources,
            settings=self.settings,
        ) as writer:
            for name, jobs in self.jobs.items():
                for job in jobs:
                    job(writer)
                progress.advance(changes.jobs[name].read_bytes)


def plan_masks(
    changes: Changes, is_compressed: Callable[[str], bool], lambdas: Mapping[str, float], dtype: DType | None
) -> Compression:
    """Plan the multi-task vector and a mask per fine-tune; tensors that are not compressed are kept whole."""
    plan = Compression("mask", settings={"lambda": dict(lambdas)})
    for name, job in changes.jobs.items():
        tasks = changes.changed(name)
        if not tasks:
            continue
        if not is_compressed(name):
            _keep_whole(plan, changes, name, tasks)
            continue
        info = TensorInfo(name, dtype or job.tensor.dtype, job.tensor.shape)
        parts = [part_info(name, "vector", None, info)]
        parts += [_bits_info(name, "mask", task, job.tensor.count) for task in tasks]
        plan.add(
            name, parts, lambda writer, name=name, tasks=tasks: _write_masks(writer, changes, name, tasks, lambdas)
        )
        plan.compressed.extend((name, task) for task in tasks)
    return plan


def _write_masks(
    writer: WeightsWriter, changes: Changes, name: str, tasks: Sequence[str], lambdas: Mapping[str, float]
) -> None:
    vector_name = part_name(name, "vector")
    dtype = writer.placed[vector_name].dtype
    masks = {task: _BitStream(writer, part_name(name, "mask", task)) for task in tasks}
    for start, x in changes.slices(name):
        vector = x.sum(axis=0)
        raw = encode(vector.copy(), dtype)
        writer.write(vector_name, start, raw)
        # Masks are of the vector that is stored, so that rounding it costs nothing where it is one task's alone.
        decode(raw, dtype, vector)
        for task, change in zip(changes.tasks, x, strict=True):
            if task in masks:
                masks[task].add(np.abs(change) > np.float32(lambdas[task]) * np.abs(vector - change))
    for mask in masks.values():
        mask.close()


def plan_signs(changes: Changes, is_compressed: Callable[[str], bool], per_row: bool) -> Compression:
    """Plan one bit per element and a scale per tensor, or per row, for each fine-tune."""
    plan = Compression("bit", settings={"scale": "row" if per_row else "tensor"})
    for name, job in changes.jobs.items():
        shape, tasks = job.tensor.shape, changes.changed(name)
        if not is_compressed(name):
            _keep_whole(plan, changes, name, tasks)
            continue
        for task in tasks:
            scales = job.tensor.count // shape[-1] if per_row else 1
            parts = [_bits_info(name, "signs", task, job.tensor.count)]
            parts.append(TensorInfo(part_name(name, "scale", task), SCALES, (scales,)))
            plan.add(name, parts, lambda writer, name=name, task=task: _write_signs(writer, changes, name, task))
            plan.compressed.append((name, task))
    return plan


def _write_signs(writer: WeightsWriter, changes: Changes, name: str, task: str) -> None:
    scale_name = part_name(name, "scale", task)
    totals = np.zeros(writer.placed[scale_name].count)
    width = changes.jobs[name].tensor.count // len(totals)
    signs = _BitStream(writer, part_name(name, "signs", task))
    for start, x in changes.slices_of(name, task):
        signs.add(x >= 0)
        first = start // width
        sums = np.bincount(np.arange(start, start + len(x)) // width - first, weights=np.abs(x))
        totals[first : first + len(sums)] += sums
    signs.close()
    writer.write(scale_name, 0, encode((totals / width).astype(np.float32), SCALES))


def plan_pairs(
    changes: Changes, is_compressed: Callable[[str], bool], rule: RankRule, dtype: DType, progress: Progress
) -> Compression:
    """Plan a low-rank pair per matrix and fine-tune."""
    plan = Compression("svd", settings={"dtype": dtype.torch})
    matrices: list[Key] = []
    for name in changes.jobs:
        tasks = changes.changed(name)
        if len(changes.shape(name)) == 2 and is_compressed(name):
            matrices += [(name, task) for task in tasks]
        else:
            _keep_whole(plan, changes, name, tasks)
    spent = sum(part.nbytes for part in plan.parts)
    plan.compressed.extend(matrices)
    for (name, task), rank in rule.apply(changes, matrices, dtype, spent, progress).items():
        place = PairPlace(part_name(name, "rows", task), part_name(name, "cols", task))
        plan.add(name, place.infos(changes.shape(name), rank, dtype), _writes_pair(changes, (name, task), place, rank))
    return plan


def _writes_pair(changes: Changes, key: Key, place: PairPlace, rank: int) -> Callable[[WeightsWriter], None]:
    return lambda writer: place.write(writer, changes.matrix(*key), rank)


def _keep_whole(plan: Compression, changes: Changes, name: str, tasks: Sequence[str]) -> None:
    for task in tasks:
        info = TensorInfo(name, changes.whole_dtype(name, task), changes.shape(name))
        part = part_info(name, "whole", task, info)
        plan.add(name, [part], lambda w, task=task, stored=part.name: copy_whole(w, changes, (name, task), stored))


def copy_whole(writer: WeightsWriter, changes: Changes, key: Key, stored: str) -> None:
    """Write a fine-tune's own values of a tensor under the name `stored`."""
    place, dtype = changes.tuned(*key), writer.placed[stored].dtype
    for start, stop in chunks(changes.shape(key[0])):
        values = np.empty(stop - start, np.float32)
        place.read(start, stop, values)
        writer.write(stored, start, encode(values, dtype))


def _bits_info(name: str, part: str, task: str, count: int) -> TensorInfo:
    return TensorInfo(part_name(name, part, task), BITS, (packed_bytes(count),))


class _BitStream:
    """Packs bits that come in pieces of any length, and writes each byte once it is full."""

    def __init__(self, writer: WeightsWriter, name: str) -> None:
        self.writer, self.name = writer, name
        self.position = 0
        self.rest = np.empty(0, np.bool_)

    def add(self, bits: NDArray[np.bool_]) -> None:
        bits = np.concatenate([self.rest, bits]) if len(self.rest) else bits
        full = len(bits) // 8 * 8
        self._write(pack_bits(bits[:full]))
        self.rest = bits[full:].copy()

    def close(self) -> None:
        self._write(pack_bits(self.rest))

    def _write(self, raw: Bytes) -> None:
        if len(raw):
            self.writer.write(self.name, self.position, raw)
            self.position += len(raw)
