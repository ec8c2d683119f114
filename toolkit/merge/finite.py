"""Where NaN and infinity are, once a merge has met some."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from toolkit.checkpoints.deltas import chunks
from toolkit.checkpoints.reader import FolderCheckpoint
from toolkit.merge.job import Place
from toolkit.merge.nested import MergedCheckpoint
from toolkit.merge.plan import Plan


def non_finite_outputs(folder: Path, tensors: Sequence[str]) -> list[str]:
    """Name those of the tensors of a written model that hold NaN or infinity."""
    if not tensors:
        return []
    with FolderCheckpoint(folder) as written:
        return [name for name in tensors if not is_finite(Place(written, name))]


def non_finite_inputs(plan: Plan, tensors: Sequence[str]) -> dict[str, list[str]]:
    """Name the inputs of output tensors that hold NaN or infinity, and which of their tensors do.

    Of a merge inside the merge its own inputs are named.
    """
    wanted, found = set(tensors), dict[str, list[str]]()
    places = {place for job in plan.jobs if job.tensor.name in wanted for place in job.places}
    stored = {inner for place in places for inner in _inputs_of(place)}
    for place in sorted(stored, key=lambda p: (p.checkpoint.source, p.name)):
        if not is_finite(place):
            found.setdefault(place.checkpoint.source, []).append(place.name)
    return found


def _inputs_of(place: Place) -> Iterator[Place]:
    if not isinstance(place.checkpoint, MergedCheckpoint):
        yield place
        return
    for inner in place.checkpoint.job(place.name).places:
        yield from _inputs_of(inner)


def is_finite(place: Place) -> bool:
    """Tell whether a tensor holds neither NaN nor infinity."""
    for start, stop in chunks(place.info.shape) if place.info.dtype.floating else ():
        values = np.empty(stop - start, np.float32)
        place.read(start, stop, values)
        if not np.isfinite(values).all():
            return False
    return True
