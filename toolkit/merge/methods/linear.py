"""Weighted average of weights: `sum_i w_i theta_i / sum_i w_i`.

Wortsman et al., "Model soups: averaging weights of multiple fine-tuned models improves accuracy without
increasing inference time", 2022 (arXiv:2203.05482). As in mergekit, a base is one more model where `parameters` give
it a weight; else it is the donor only.
"""

from __future__ import annotations

from pydantic import model_validator

from toolkit.checkpoints.dtypes import Floats
from toolkit.merge.method import MethodParams
from toolkit.merge.ops import weighted_sum

TAKES = "weights"
MODELS = (1, None)
USES_ALL = True
BASE_JOINS = True


class Params(MethodParams):
    """Parameters of `linear`.

    Attributes:
        weight: of each model.
        normalize: divide by the sum of the weights.
    """

    weight: tuple[float, ...]
    normalize: bool = True

    @model_validator(mode="after")
    def _can_normalize(self) -> Params:
        if self.normalize and not sum(self.weight):
            raise ValueError("the weights sum to 0, which cannot be normalized")
        return self


def combine(x: Floats, params: Params, state: None, start: int) -> Floats:
    """Average one chunk `[M, N]`."""
    return weighted_sum(x, _shares(params))


def coefficients(params: Params, state: object = None) -> list[float] | None:
    """Return the factor of each model's delta; a sum that is not normalized scales the base as well."""
    return _shares(params) if idempotent(params) else None


def _shares(params: Params) -> list[float]:
    total = sum(params.weight) if params.normalize else 1.0
    return [weight / total for weight in params.weight]


def idempotent(params: Params) -> bool:
    """Tell whether equal models give that model."""
    return params.normalize or sum(params.weight) == 1
