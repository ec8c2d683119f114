"""aTLAS: task vectors composed with one learned coefficient per vector and parameter tensor.

Coefficients start at 0, where the model is the base, and are free: what harms is taken out. The loss is supervised
(`cross_entropy`, the default), or `entropy` for adapting to texts without labels, or `distillation`. With
`informative` below 1 only that share of the tensors is learned, those whose gradients are largest at the start; the
paper mixes the most informative blocks but does not say in its abstract how they are found, so this is a choice made
here. `toolkit train` has the same as an adapter, whose only weights are the coefficients (`method: atlas`).

Zhang et al., "Knowledge Composition using Task Vectors with Learned Anisotropic Scaling", 2024 (arXiv:2407.02880).
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from toolkit.merge.learning.session import Outcome, Session
from toolkit.merge.learning.spec import DescentParams, Granularity, Loss


class Params(DescentParams):
    """Parameters of `atlas`.

    Attributes:
        informative: share of the tensors whose coefficients are learned.
    """

    granularity: Granularity = "tensor"
    start: float | None = 0.0
    loss: Loss = "cross_entropy"
    learning_rate: Annotated[float, Field(gt=0)] = 1e-2
    informative: Annotated[float, Field(gt=0, le=1)] = 1.0


def learn(session: Session, params: Params) -> Outcome:
    """Lower the loss."""
    from toolkit.merge.learning.descend import descend

    return descend(session, informative=params.informative)
