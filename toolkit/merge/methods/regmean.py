"""RegMean: the linear weights whose outputs are nearest to those of every model on its own data.

For a linear layer with inputs `X_i` in model i, `W = (sum_i G_i)^-1 sum_i G_i W_i` with `G_i = X_i^T X_i` minimises
`sum_i |X_i W - X_i W_i|^2`. `G_i` is averaged over tokens here, so that no model counts for more because it has more
data, and its off-diagonal elements are multiplied by `alpha`, which regularises. What is not the weight of a linear
layer is averaged.

Jin et al., "Dataless Knowledge Fusion by Merging Weights of Language Models", 2022 (arXiv:2212.09849).
"""

from __future__ import annotations

from toolkit.merge.methods import _regmean

TAKES = "weights"
MODELS = (1, None)
USES_ALL = True
SCOPE = "tensor"
STATISTICS = "gram"

Params = _regmean.RegMeanParams
prepare, combine, memory = _regmean.prepare, _regmean.combine, _regmean.memory
