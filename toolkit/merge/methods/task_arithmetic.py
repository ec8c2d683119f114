"""Sum of task vectors: `theta_0 + lambda * sum_i w_i (theta_i - theta_0)`.

Ilharco et al., "Editing Models with Task Arithmetic", 2022 (arXiv:2212.04089).
"""

from __future__ import annotations

from pydantic import Field

from toolkit.checkpoints.dtypes import Floats
from toolkit.merge.method import MethodParams
from toolkit.merge.ops import weighted_sum

TAKES = "deltas"
MODELS = (1, None)
USES_ALL = True


class Params(MethodParams):
    """Parameters of `task_arithmetic`.

    Attributes:
        weight: of each model's delta.
        scale: `lambda` in a spec; of the sum.
        normalize: divide the sum by the sum of the weights.
    """

    weight: tuple[float, ...] = (1.0,)
    scale: float = Field(1.0, alias="lambda")
    normalize: bool = False


def combine(x: Floats, params: Params, state: None, start: int) -> Floats:
    """Add one chunk of deltas `[M, N]`."""
    return weighted_sum(x, coefficients(params))


def coefficients(params: Params, state: object = None) -> list[float]:
    """Return the factor of each model's delta."""
    total = sum(params.weight)
    scale = params.scale / total if params.normalize and total else params.scale
    return [scale * weight for weight in params.weight]
