"""GradNormLoRP (2412.19616): weights normalised by rows, and low-rank moments of the directions' gradients.

Each row of a matrix is `m v / |v|`. The gradient of the magnitude `m` is that of the row along its direction; the one
of `v` is tangent, `(m / |v|) (g - u (g . u))` with `u = v / |v|`, and is projected as GaLore does. What comes back
moves `v`, which need not be kept beside the matrix: its length is enough. Matrices with a row of zeros, such as LoRA's
B at its start, have no directions and are trained as they are.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from toolkit.adapters.training._adam import AdamParams, LeanMethod, linear_weights, split_groups


class Gradnormlorp(LeanMethod):
    """AdamW on magnitudes, and on projected gradients of directions."""

    class Params(AdamParams):
        """Parameters.

        Attributes:
            rank: of the projection.
            gap: steps from one projection to the next.
            scale: of what comes back from the projection.
        """

        rank: Annotated[int, Field(ge=1)] = 8
        gap: Annotated[int, Field(ge=1)] = 200
        scale: Annotated[float, Field(gt=0)] = 1.0

    params: Params

    def groups(self, model: Any, groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Normalise the weights of linear layers, and project the gradients of their directions."""
        p = self.params
        settings = {"rank": p.rank, "gap": p.gap, "scale": p.scale, "normalised": True}
        return split_groups(groups, linear_weights(model), settings)
