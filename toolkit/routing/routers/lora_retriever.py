"""Retrieve adapters as documents: each is the mean of a few of its prompts, compared by the cosine.

Zhao et al., "LoraRetriever: input-aware LoRA retrieval and composition for mixed tasks in the wild", 2024. The paper's
encoder is told what to compare (give its instruction as `embedding.prefix`), and the best few adapters are composed
(`policy.top`). A new adapter needs a dozen prompts and no training.
"""

from __future__ import annotations

from typing import Annotated

import numpy as np
from pydantic import Field

from toolkit.routing.examples import Examples
from toolkit.routing.ops import State, Vectors, check_arrays, check_width, normalized, products, size
from toolkit.specs import Spec

SCORES = "similarity"


class Params(Spec):
    """Parameters of `lora_retriever`.

    Attributes:
        samples: prompts that an expert is described by, drawn at random.
        seed: of the draw.
    """

    samples: Annotated[int, Field(ge=1)] = 20
    seed: Annotated[int, Field(ge=0)] = 0


def fit(vectors: Vectors, examples: Examples, params: Params) -> dict[str, Vectors]:
    """Average a few vectors of each expert."""
    rng = np.random.default_rng(params.seed)
    chosen = [rows[np.sort(rng.permutation(len(rows))[: params.samples])] for rows in examples.members()]
    return {"documents": np.concatenate([_document(vectors[rows]) for rows in chosen])}


def add(state: State, vectors: Vectors) -> dict[str, Vectors]:
    """Append an expert, described by all its prompts that are given."""
    return {"documents": np.concatenate([state["documents"], _document(vectors)])}


def score(vectors: Vectors, state: State) -> Vectors:
    """Return the cosine with every expert's document."""
    check_width(vectors, size(state, "documents"))
    return products(normalized(vectors).astype(np.float32), state["documents"])


def check(state: State, num_experts: int) -> None:
    """Check that the documents are there, finite, and one for each expert."""
    check_arrays(state, {"documents": (num_experts, -1)})


def _document(vectors: Vectors) -> Vectors:
    return normalized(normalized(vectors).mean(axis=0, keepdims=True)).astype(np.float32)
