"""RegMean++: regression means of linear weights, on inputs that have gone through the merged layers below.

`W = (sum_i G_i)^-1 sum_i G_i W_i` with `G_i = X_i^T X_i`, whose inputs `X_i` have gone through the merged layers below.

As `regmean`, but layer by layer: what enters layer l of model i is what its data became in the merged layers below l,
not in the model's own, for that is what the merged layer will meet.

Nguyen et al., "RegMean++: Enhancing Effectiveness and Generalization of Regression Mean for Model Merging", 2025
(arXiv:2508.03121).
"""

from __future__ import annotations

from toolkit.merge.methods import _regmean

TAKES = "weights"
MODELS = (1, None)
USES_ALL = True
SCOPE = "tensor"
STATISTICS = "merged_gram"

Params = _regmean.RegMeanParams
prepare, combine, memory = _regmean.prepare, _regmean.combine, _regmean.memory
