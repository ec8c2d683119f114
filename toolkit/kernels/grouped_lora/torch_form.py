"""Two matrix products per segment at the adapter's true rank, added to the output in place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from toolkit.kernels.grouped_lora.api import Pair, Segment


def grouped_lora(
    y_TN: torch.Tensor,
    x_TK: torch.Tensor,
    segments: Sequence[Segment],
    pairs: Mapping[str, Pair],
    bias_N: torch.Tensor | None,
) -> None:
    """See the api."""
    for segment in segments:
        pair = pairs[segment.adapter]
        x, y = x_TK[segment.start : segment.stop], y_TN[segment.start : segment.stop]
        inner_Tr = torch.mm(x, pair.a_rK.T)
        y.addmm_(inner_Tr, pair.b_Nr.T, alpha=segment.weight)
        if pair.gain_N is not None:
            if bias_N is not None:
                y.sub_(bias_N).mul_(pair.gain_N).add_(bias_N)
            else:
                y.mul_(pair.gain_N)
