"""RegMean: the linear weights whose outputs are nearest to those of every model on its own data.

For a linear layer with inputs `X_i` in model i, `W = (sum_i G_i)^-1 sum_i G_i W_i` with `G_i = X_i^T X_i` minimises
`sum_i |X_i W - X_i W_i|^2`. `G_i` is averaged over tokens here, so that no model counts for more because it has more
data, and its off-diagonal elements are multiplied by `alpha`, which regularises. What is not the weight of a linear
layer is averaged.

Jin et al., "Dataless Knowledge Fusion by Merging Weights of Language Models", 2022 (arXiv:2212.09849).
"""

from __future__ import annotations

from toolkit.checkpoints.dtypes import Floats
from toolkit.merge.method import MethodParams, TensorStream
from toolkit.merge.methods._regmean import RegMeanParams, regression_bytes, regression_mean

TAKES = "weights"
MODELS = (1, None)
SCOPE = "tensor"
STATISTICS = "gram"


class Params(RegMeanParams, MethodParams):
    """Parameters of `regmean`; those of regression means."""


def prepare(tensor: TensorStream, params: Params) -> TensorStream:
    """Return the tensor, whose statistics are read when it is merged."""
    return tensor


def combine(x: Floats, params: Params, state: TensorStream, start: int) -> Floats:
    """Merge one tensor `[M, *shape]`."""
    return regression_mean(x, state, params)


def memory(shape: tuple[int, ...], models: int) -> int:
    """Bound what `combine` allocates."""
    return regression_bytes(shape, models)
