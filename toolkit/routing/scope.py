"""Prompts unlike any that a router was fitted on, by the cosine distance to the nearest of them.

Deep nearest neighbours are a plain and hard to beat detector (Sun et al., "Out-of-distribution detection with deep
nearest neighbors", 2022). Vectors are centred, so the cosine of unrelated prompts is near 0 and their distance near 1.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from toolkit.routing.ops import Vectors, normalized

REFERENCES = 1000
"""Prompts that are kept, at most, drawn at random."""


def fit(vectors: Any, share: float) -> tuple[Vectors, float]:
    """Choose references; return them and the distance beyond which `share` of the fitted prompts lie.

    Each prompt is held against the others, never against itself.
    """
    rows = np.sort(np.random.default_rng(0).permutation(vectors.shape[0])[:REFERENCES])
    references = _dense(vectors[rows])
    near = references @ references.T
    np.fill_diagonal(near, -1)
    distances = 1 - near.max(axis=1)
    return references, float(np.quantile(distances, 1 - share))


def novelty(vectors: Any, references: Vectors) -> Vectors:
    """Return `[B]`, the distance of each prompt to the nearest reference: 0 the same, 1 unrelated, 2 opposite."""
    return 1 - (_dense(vectors) @ references.T).max(axis=1)


def _dense(vectors: Any) -> Vectors:
    return normalized(vectors if isinstance(vectors, np.ndarray) else vectors.toarray()).astype(np.float32)
