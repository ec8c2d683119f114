"""Self Positioning: find the best point between fine-tunes by stochastic gradient descent on a small probe set.

`theta_0 + s * sum_i a_i d_i` with `a` on the simplex, and `a` and `s` trained.

The task vectors' weights lie on the simplex, one per model, and are multiplied with an overall scale; both are
trained on a balanced probe set of every task, by default with the contrastive loss of embedding models. The abstract
does not say how the space is parameterised nor what regulariser it has: `scale: null` fixes the scale at 1 and so
stays inside the simplex of the models, `penalty` pulls the weights towards where they start, and `bounds: free`
leaves the simplex.

Li et al., "Improving General Text Embedding Model: Tackling Task Conflict and Data Imbalance through Model Merging",
2024 (arXiv:2410.15035).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from toolkit.merge.learning.session import Outcome, Session
from toolkit.merge.learning.spec import DescentParams, Loss

if TYPE_CHECKING:
    from torch import Tensor

    from toolkit.merge.learning.coefficients import Coefficients


class Params(DescentParams):
    """Parameters of `self_positioning`.

    Attributes:
        scale: start of the overall scale; `null` for one that stays 1.
        penalty: factor of the squared distance of the weights from their start.
    """

    bounds: Literal["free", "clamp", "simplex"] = "simplex"
    loss: Loss = "contrastive"
    temperature: Annotated[float, Field(gt=0)] = 0.05
    optimizer: Literal["adam", "sgd"] = "sgd"
    learning_rate: Annotated[float, Field(gt=0)] = 1e-2
    scale: Annotated[float, Field(gt=0)] | None = 1.0
    penalty: Annotated[float, Field(ge=0)] = 0.0


def learn(session: Session, params: Params) -> Outcome:
    """Lower the loss on the probe set."""
    from toolkit.merge.learning.descend import descend

    start = params.start_of(session.models)

    def penalty(coefficients: Coefficients) -> Tensor:
        return params.penalty * (coefficients.weights - start).square().sum()

    return descend(session, scale=params.scale, penalty=penalty if params.penalty else None)
