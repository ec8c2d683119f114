"""Arrow: a token goes to the LoRAs whose change is largest in its direction; nothing is trained.

The prototype of an expert at a linear is the leading right singular vector of `B A`, the input that its change
magnifies most. It is exact: with `B = Q_B R_B` and `A^T = Q_A R_A` the singular values of `B A` are those of the small
matrix `R_B R_A^T`. The score of a row is `|x . v|`, so that the sign of a singular vector, which means nothing, changes
nothing.

Ostapenko et al., "Towards Modular LLMs by Building and Reusing a Library of LoRAs", 2024, arXiv:2405.11157.
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from toolkit.kernels.grouped_lora import Pair
from toolkit.routing.token.ops import Choice, products, top_softmax
from toolkit.specs import Spec


class Params(Spec):
    """Parameters of `arrow`.

    Attributes:
        top_k: experts of a token.
        temperature: of the softmax over their scores.
    """

    top_k: Annotated[int, Field(ge=1)] = 2
    temperature: Annotated[float, Field(gt=0)] = 1.0


def vector(pair: Pair) -> Tensor:
    """Return the leading right singular vector of `B A`, `[K]` float32, its largest entry positive; 0 where it is 0."""
    q_a, r_a = torch.linalg.qr(pair.a_rK.double().T)
    _, r_b = torch.linalg.qr(pair.b_Nr.double())
    _, values, right = torch.linalg.svd(r_b @ r_a.T)
    if not values[0] > 0:
        return pair.a_rK.new_zeros(pair.a_rK.shape[1], dtype=torch.float32)
    found = q_a @ right[0]
    return (found * found[found.abs().argmax()].sign()).float()


def route(x_TK: Tensor, vectors_EK: Tensor, params: Params) -> Choice:
    """Choose by `|x . v|`."""
    return top_softmax(products(x_TK, vectors_EK).abs(), params.top_k, params.temperature)
