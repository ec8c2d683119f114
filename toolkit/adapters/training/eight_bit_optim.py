"""AdamW with moments of 8 bits (2110.02861): the steps of 32 bits, for a quarter of the memory.

Moments are quantised block by block to values that are dense near zero (`_blocks`), so that an outlier costs precision
in its own block alone. Those of embeddings keep 32 bits, since their gradients are uneven. The paper's layer norm after
the embedding would be another architecture, and is left out.
"""

from __future__ import annotations

from typing import Any, Literal

from torch import nn

from toolkit.adapters.training._adam import AdamParams, LeanMethod, split_groups


class EightBitOptim(LeanMethod):
    """AdamW in 8 bits."""

    class Params(AdamParams):
        """Parameters.

        Attributes:
            embeddings: bits of the moments of embeddings.
        """

        bits: Literal[8, 32] = 8
        embeddings: Literal[8, 32] = 32

    params: Params

    def groups(self, model: Any, groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Leave embeddings their 32 bits."""
        if self.params.embeddings == 8:
            return groups
        tables = [p for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters(recurse=False)]
        return split_groups(groups, tables, {"block": None})
