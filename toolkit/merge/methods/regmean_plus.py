"""RegMean++: regression means of linear weights, on inputs that have gone through the merged layers below.

As `regmean`, but layer by layer: what enters layer l of model i is what its data became in the merged layers below l,
not in the model's own, for that is what the merged layer will meet.

Nguyen et al., "RegMean++: Enhancing Effectiveness and Generalization of Regression Mean for Model Merging", 2025
(arXiv:2508.03121).
"""

from __future__ import annotations

from toolkit.checkpoints.dtypes import Floats
from toolkit.merge.method import MethodParams, TensorStream
from toolkit.merge.methods._regmean import RegMeanParams, regression_bytes, regression_mean

TAKES = "weights"
MODELS = (1, None)
SCOPE = "tensor"
STATISTICS = "merged_gram"


class Params(RegMeanParams, MethodParams):
    """Parameters of `regmean_plus`; those of regression means."""


def prepare(tensor: TensorStream, params: Params) -> TensorStream:
    """Return the tensor, whose statistics are read when it is merged."""
    return tensor


def combine(x: Floats, params: Params, state: TensorStream, start: int) -> Floats:
    """Merge one tensor `[M, *shape]`."""
    return regression_mean(x, state, params)


def memory(shape: tuple[int, ...], models: int) -> int:
    """Bound what `combine` allocates."""
    return regression_bytes(shape, models)
