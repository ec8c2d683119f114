"""PHATGOOSE: a gate for every LoRA, trained after it and apart from all others.

While the LoRA is frozen, a vector `g` per linear is trained on the LoRA's own data to let its change through,
`y + sigmoid(g . x) B A x` (`token.gates`). Later the gates of several experts are compared: gates and inputs are both
standardised, a token goes to the experts with the largest `g . x / sqrt(K)`, with the softmax of these.

Muqeeth et al., "Learning to Route Among Specialized Experts for Zero-Shot Generalization", 2024, arXiv:2402.05859.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field
from torch import Tensor

from toolkit.routing.token.ops import Choice, products, standardized, top_softmax
from toolkit.specs import Spec

BESIDE = True
"""The gate of an expert is kept in the adapter's own folder."""


class Params(Spec):
    """Parameters of `phatgoose`.

    Attributes:
        top_k: experts of a token.
        temperature: of the softmax over their scores.
    """

    top_k: Annotated[int, Field(ge=1)] = 2
    temperature: Annotated[float, Field(gt=0)] = 1.0


def route(x_TK: Tensor, vectors_EK: Tensor, params: Params) -> Choice:
    """Choose by the correlation of input and gate, times `sqrt(K)`."""
    scores = products(standardized(x_TK), standardized(vectors_EK)) / x_TK.shape[1] ** 0.5
    return top_softmax(scores, params.top_k, params.temperature)
