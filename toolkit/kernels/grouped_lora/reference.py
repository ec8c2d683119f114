"""The specification: one row at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

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
        for row in range(segment.start, segment.stop):
            change_N = pair.b_Nr @ (pair.a_rK @ x_TK[row])
            if pair.gain_N is None:
                y_TN[row] += segment.weight * change_N
            else:
                bias = 0 if bias_N is None else bias_N
                y_TN[row] = pair.gain_N * (y_TN[row] - bias + change_N) + bias
