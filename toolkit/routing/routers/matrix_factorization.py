"""Matrix factorisation: a vector per expert and one per prompt, whose product is how good the expert is there.

The form of Ong et al., "RouteLLM: learning to route LLMs with preference data", 2024:
`s(m, q) = w . (v_m * (W q + b))`, with `v_m` of length 1, and the probability that expert `m` beats expert `n` on the
prompt `q` the sigmoid of `s(m, q) - s(n, q)`. It learns from pairs of experts of which one was better on a prompt.
"""

from __future__ import annotations

from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from toolkit.errors import DataError
from toolkit.routing.examples import Examples
from toolkit.routing.ops import State, Vectors, check_arrays, check_width, size
from toolkit.specs import Spec

SCORES = "preference"


class Params(Spec):
    """Parameters of `matrix_factorization`.

    Attributes:
        rank: length of the vectors.
        epochs: over the pairs.
        batch_size: pairs per step.
        learning_rate: of AdamW.
        weight_decay: likewise.
        ties: weight of pairs that were equally good, whose probability is one half; 0 leaves them out.
        seed: of the start and the draws.
    """

    rank: Annotated[int, Field(ge=1)] = 64
    epochs: Annotated[int, Field(ge=1)] = 30
    batch_size: Annotated[int, Field(ge=1)] = 256
    learning_rate: Annotated[float, Field(gt=0)] = 3e-3
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    ties: Annotated[float, Field(ge=0)] = 1.0
    seed: Annotated[int, Field(ge=0)] = 0


def fit(vectors: Vectors, examples: Examples, params: Params) -> dict[str, Vectors]:
    """Train on every pair of experts that were asked the same prompt.

    Raises:
        DataError: no expert was ever better than another.
    """
    import torch
    from torch import nn
    from torch.nn import functional

    pairs = [torch.from_numpy(part) for part in _pairs(examples.quality)]
    if not (pairs[3] == 1).any():
        raise DataError("no expert is better than another on any row, so there is nothing to learn")
    x = torch.from_numpy(vectors)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(params.seed)
        experts = nn.Parameter(torch.randn(examples.quality.shape[1], params.rank))
        project, judge = nn.Linear(vectors.shape[1], params.rank), nn.Linear(params.rank, 1, bias=False)
        trained = [experts, *project.parameters(), *judge.parameters()]
        optimizer = torch.optim.AdamW(trained, lr=params.learning_rate, weight_decay=params.weight_decay)
        for _ in range(params.epochs):
            for batch in torch.randperm(len(pairs[0])).split(params.batch_size):
                rows, better, worse, wins = (part[batch] for part in pairs)
                unit = functional.normalize(experts, dim=1)
                logits = judge((unit[better] - unit[worse]) * project(x[rows]))[:, 0]
                weight = torch.where(wins == 1, 1.0, params.ties)
                optimizer.zero_grad()
                functional.binary_cross_entropy_with_logits(logits, wins, weight).backward()
                optimizer.step()
    scaled = functional.normalize(experts, dim=1) * judge.weight
    found = {"experts": scaled, "projection": project.weight.T, "bias": project.bias}
    return {name: value.detach().numpy().copy() for name, value in found.items()}


def score(vectors: Vectors, state: State) -> Vectors:
    """Return `s(m, q)`; only differences between experts mean something."""
    check_width(vectors, size(state, "projection", 0))
    projected: Any = vectors @ state["projection"] + state["bias"]
    return projected @ state["experts"].T


def check(state: State, num_experts: int) -> None:
    """Check that the arrays are all there, finite, and of sizes that fit each other and the experts."""
    rank = size(state, "experts")
    check_arrays(state, {"experts": (num_experts, rank), "projection": (-1, rank), "bias": (rank,)})


def _pairs(quality: NDArray[np.float64]) -> list[NDArray[Any]]:
    """Return rows, better experts, worse experts, and float32 1 where one is better, 0.5 where they are equal."""
    found = []
    for m in range(quality.shape[1]):
        for n in range(m):
            apart = quality[:, m] - quality[:, n]
            rows = np.flatnonzero(np.isfinite(apart))
            first, wins = apart[rows] >= 0, np.where(apart[rows] == 0, np.float32(0.5), np.float32(1))
            found.append([rows, np.where(first, m, n), np.where(first, n, m), wins])
    return [np.concatenate(parts) for parts in zip(*found, strict=True)]
