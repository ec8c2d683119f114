"""GaLore (2403.03507): Adam's moments of a low-rank projection of every matrix's gradient.

The gradient `G` `[M, N]` becomes `R = P^T G` `[r, N]` (on the longer side `G Q`), `P` its leading singular directions
every `gap` steps; Adam's step `A` in `R` moves the matrix by `scale * P A`. Weights are trained whole, at the memory of
moments of rank r.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from toolkit.adapters.training._adam import AdamParams, LeanMethod, linear_weights, split_groups


class Galore(LeanMethod):
    """AdamW on projected gradients."""

    class Params(AdamParams):
        """Parameters.

        Attributes:
            rank: of the projection. Matrices with no larger side, embeddings, the head and vectors are trained as they
                are.
            gap: steps from one projection to the next.
            scale: of what comes back from the projection.
        """

        rank: Annotated[int, Field(ge=1)] = 128
        gap: Annotated[int, Field(ge=1)] = 200
        scale: Annotated[float, Field(gt=0)] = 0.25

    params: Params

    def groups(self, model: Any, groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Project the gradients of linear layers."""
        p = self.params
        return split_groups(groups, linear_weights(model), {"rank": p.rank, "gap": p.gap, "scale": p.scale})
