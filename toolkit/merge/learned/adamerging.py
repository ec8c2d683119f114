"""AdaMerging: coefficients that make the merged model sure of what it predicts, on texts without labels.

The loss is the sum over tasks of the mean entropy of the predictions. Coefficients start at 0.3 and stay between 0
and 1; there is one per task (`granularity: task`), or one per task and parameter tensor, which the authors call
layer-wise (`tensor`, the default here); `layer` shares one among the tensors of a layer. A `density` makes it
AdaMerging++: task vectors are trimmed and agree in sign, as in TIES, before they are scaled. The authors clamp
coefficients as they are used, so that one beyond a bound gets no gradient any more; here they are put back onto the
bound after every step.

Yang et al., "AdaMerging: Adaptive Model Merging for Multi-Task Learning", 2023 (arXiv:2310.02575).
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from toolkit.merge.learning.session import Outcome, Session
from toolkit.merge.learning.spec import DescentParams, Granularity


class Params(DescentParams):
    """Parameters of `adamerging`.

    Attributes:
        density: for AdaMerging++: share of each task vector that is kept, 0.2 in the paper.
    """

    granularity: Granularity = "tensor"
    start: float | None = 0.3
    bounds: Literal["free", "clamp", "simplex"] = "clamp"
    density: Annotated[float, Field(gt=0, le=1)] | None = None


def learn(session: Session, params: Params) -> Outcome:
    """Lower the entropy of the predictions."""
    from toolkit.merge.learning.descend import descend

    return descend(session)
