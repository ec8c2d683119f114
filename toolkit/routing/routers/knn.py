"""Nearest neighbours by cosine: what the experts were worth on the prompts most like this one.

`score_e(x) = sum_{j in N(x)} quality_e(j) / |N(x)|` over the nearest prompts `N(x)` of the fit; one of the routers of
Hu et al., "RouterBench: A Benchmark for Multi-LLM Routing System", 2024 (arXiv:2403.12031).

On measured answers a score is the mean quality of an expert on the nearest prompts that it answered. Where prompts were
made for experts, it is the mean similarity to the nearest of the expert's own. An expert's score depends on no other's
prompts, so adding one changes no bit of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from toolkit.errors import CheckpointError
from toolkit.routing.examples import Examples
from toolkit.routing.ops import State, Vectors, check_arrays, check_width, normalized, products, size
from toolkit.specs import Spec

SCORES = "quality"
CANDIDATES = {"quality": (10, 25, 50, 100, 200), "similarity": (1, 3, 5, 10, 20)}
"""Numbers of neighbours that are tried, where none is given."""
AT_ONCE = 256
"""Prompts that are scored at once."""
TOGETHER = 64
"""Experts whose prompts are laid out side by side."""
TRIED = 2000
"""Prompts that they are tried on, at most."""


class Params(Spec):
    """Parameters of `knn`.

    Attributes:
        neighbors: prompts that vote; by default the number that predicts each prompt best from the others.
        limit: prompts of the fit that are kept, at most, drawn at random.
    """

    neighbors: Annotated[int, Field(ge=1)] | None = None
    limit: Annotated[int, Field(ge=1)] = 50_000


def fit(vectors: Vectors, examples: Examples, params: Params) -> dict[str, Vectors]:
    """Keep the prompts and what the experts were worth on them."""
    rng = np.random.default_rng(0)
    rows = np.sort(rng.permutation(len(examples))[: params.limit])
    examples = examples.take(rows)
    references = normalized(vectors[rows]).astype(np.float32)
    state = {"references": references}
    if examples.labelled:
        examples.members()
        state["owner"] = examples.labels.astype(np.float32)
    else:
        state["quality"] = examples.quality.astype(np.float32)
    neighbors = params.neighbors or _best_number(state, examples, rng)
    return state | {"neighbors": np.array([neighbors], np.float32)}


def add(state: State, vectors: Vectors) -> dict[str, Vectors]:
    """Append an expert by prompts that were made for it.

    Raises:
        CheckpointError: the router was fitted on measured answers.
    """
    if "owner" not in state:
        raise CheckpointError("this knn router holds measured answers; fit it anew with those of the new expert")
    owner = np.full(len(vectors), state["owner"].max() + 1, np.float32)
    return dict(state) | {
        "references": np.concatenate([state["references"], normalized(vectors).astype(np.float32)]),
        "owner": np.concatenate([state["owner"], owner]),
    }


def score(vectors: Vectors, state: State) -> Vectors:
    """Return the mean quality among the neighbours, or the mean similarity to them."""
    check_width(vectors, size(state, "references"))
    x, neighbors = normalized(vectors).astype(np.float32), int(state["neighbors"][0])
    parts = [x[first : first + AT_ONCE] for first in range(0, len(x), AT_ONCE)]
    return np.concatenate([_score(products(part, state["references"]), state, neighbors) for part in parts])


def check(state: State, num_experts: int) -> None:
    """Check that the arrays are all there, and of sizes that fit each other and the experts."""
    count = size(state, "references", 0)
    check_arrays(state, {"references": (count, -1), "neighbors": (1,)})
    if "owner" in state:
        check_arrays(state, {"owner": (count,)})
        if set(state["owner"].astype(int)) != set(range(num_experts)):
            raise CheckpointError("owner names other experts")
    else:
        check_arrays(state, {"quality": (count, num_experts)}, finite=False)


def _score(near: Vectors, state: State, neighbors: int) -> Vectors:
    """Return `[B, N]` from the similarities `[B, R]` to the kept prompts."""
    if "owner" in state:
        return _similarities(near, state["owner"].astype(np.int64), neighbors)
    found = np.zeros((len(near), state["quality"].shape[1]), np.float32)
    for mask, columns in _groups(np.isfinite(state["quality"])):
        rows = np.flatnonzero(mask)
        if len(rows):
            at = rows[_nearest(near[:, rows], neighbors)]
            found[:, columns] = state["quality"][:, columns][at].mean(axis=1)
    return found


def _similarities(near: Vectors, owner: NDArray[np.int64], neighbors: int) -> Vectors:
    """Return the mean of the largest similarities to each expert's prompts; experts of like size side by side."""
    counts = np.bincount(owner)
    order = np.argsort(owner, kind="stable")
    starts = np.cumsum(counts) - counts
    found = np.empty((len(near), len(counts)), np.float32)
    by_size = np.argsort(counts, kind="stable")
    for group in np.array_split(by_size, -(-len(counts) // TOGETHER)):
        # Never fewer places than neighbours: a sum of as many numbers rounds the same whoever is beside.
        width = max(int(counts[group].max()), neighbors)
        places = np.arange(width)
        own = places < counts[group, None]
        columns = order[np.where(own, starts[group, None] + places, 0)]
        largest = np.where(own, near[:, columns], -np.inf)
        if width > neighbors:
            largest = np.partition(largest, width - neighbors, axis=2)[:, :, -neighbors:]
        largest = np.sort(largest, axis=2)[:, :, ::-1]
        total = np.where(np.isfinite(largest), largest, 0).sum(axis=2)
        found[:, group] = total / np.minimum(counts[group], neighbors)
    return found


def _groups(known: NDArray[np.bool_]) -> Iterator[tuple[NDArray[np.bool_], NDArray[np.int64]]]:
    """Yield each set of rows `[R]` on which experts were measured, with these experts."""
    masks, which = np.unique(known, axis=1, return_inverse=True)
    for at in range(masks.shape[1]):
        yield masks[:, at], np.flatnonzero(which == at)


def _nearest(near: Vectors, neighbors: int) -> NDArray[np.int64]:
    """Return `[B, K]`, the places of the largest of each row, in no order."""
    count = near.shape[1]
    if count <= neighbors:
        return np.broadcast_to(np.arange(count), near.shape)
    return np.argpartition(near, count - neighbors, axis=1)[:, -neighbors:]


def _best_number(state: State, examples: Examples, rng: np.random.Generator) -> int:
    """Return the number of neighbours that predicts prompts of the fit best, each left out."""
    rows = np.sort(rng.permutation(len(examples))[:TRIED])
    near = state["references"][rows] @ state["references"].T
    near[np.arange(len(rows)), rows] = -2
    errors = {}
    for number in CANDIDATES["similarity" if examples.labelled else "quality"]:
        if errors and number > len(examples) // 4:
            break
        scores = _score(near, state, number)
        if examples.labelled:
            errors[number] = (scores.argmax(axis=1) != examples.labels[rows]).mean()
        else:
            errors[number] = np.nanmean(np.square(scores - examples.quality[rows]))
    return min(errors, key=lambda number: errors[number])
