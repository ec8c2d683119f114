"""A mixture of LoRA experts: a softmax gate at every linear, trained while the experts are frozen.

The weights of the `top_k` most likely experts are divided by their sum, which is the softmax over their scores; a
single one keeps its share among all, since a weight that is always 1 would teach the gate nothing. In training an
expert may have a capacity (`token.dispatch`); in the engine it has none, since what is dropped depends on the
neighbours in a batch.

Shazeer et al., "Outrageously Large Neural Networks: The Sparsely-Gated Mixture-of-Experts Layer", 2017,
arXiv:1701.06538; dispatch as in Hwang et al., "Tutel: Adaptive Mixture-of-Experts at Scale", 2022, arXiv:2206.03382.
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from toolkit.routing.token.ops import Choice, products, top_softmax
from toolkit.specs import Spec


class Params(Spec):
    """Parameters of `mixture`.

    Attributes:
        top_k: experts of a token.
        temperature: of the softmax.
    """

    top_k: Annotated[int, Field(ge=1)] = 2
    temperature: Annotated[float, Field(gt=0)] = 1.0


def route(x_TK: Tensor, vectors_EK: Tensor, params: Params) -> Choice:
    """Choose by the logits `W x`."""
    scores = products(x_TK, vectors_EK)
    if params.top_k > 1:
        return top_softmax(scores, params.top_k, params.temperature)
    weight, index = torch.softmax(scores / params.temperature, dim=1).max(dim=1, keepdim=True)
    return index, weight
