"""The specification: one row at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from toolkit.kernels.grouped_lora.api import Pair, Segment
    from toolkit.kernels.grouped_lora.pages import PagedPairs
    from toolkit.kernels.grouped_lora.routes import Routes


def grouped_lora(
    y_TN: torch.Tensor,
    x_TK: torch.Tensor,
    segments: Sequence[Segment],
    pairs: Mapping[str, Pair],
    bias_N: torch.Tensor | None,
) -> None:
    """See the api."""
    for segment in segments:
        for row in range(segment.start, segment.stop):
            pair = pairs[segment.adapter]
            _change(y_TN[row], pair.a_rK @ x_TK[row], pair, segment.weight, bias_N)


def paged_lora(
    ys: Sequence[torch.Tensor],
    x: torch.Tensor,
    routes: Routes,
    pairs: PagedPairs,
    biases: Sequence[torch.Tensor | None],
) -> None:
    """See the api."""
    for linear, y_TN in enumerate(ys):
        for row, slot, weight in routes.present(linear):
            pair = pairs.pair(slot, linear)
            if pair is not None:
                inner_r = pair.a_rK @ x[row] if x.dim() == 2 else pair.a_rK[:, x[row]]
                _change(y_TN[row], inner_r, pair, weight, biases[linear])


def paged_lora_backward(
    dys: Sequence[torch.Tensor], x_TK: torch.Tensor, routes: Routes, pairs: PagedPairs
) -> tuple[torch.Tensor, torch.Tensor]:
    """See the api."""
    dx_TK, dpool = torch.zeros_like(x_TK), torch.zeros_like(pairs.pool, dtype=torch.float32)
    for row, slot, weight in routes.present():
        for linear, dy_TN in enumerate(dys):
            pair = pairs.pair(slot, linear)
            if pair is not None:
                factor, (a_rK, b_Nr) = weight * pair.scale, pairs.elements(slot, linear)
                dinner_r = factor * (pair.b_Nr.T @ dy_TN[row])
                dx_TK[row] += dinner_r @ pair.a_rK
                dpool.view(-1)[a_rK] += torch.outer(dinner_r, x_TK[row])
                dpool.view(-1)[b_Nr] += torch.outer(dy_TN[row], factor * (pair.a_rK @ x_TK[row]))
    return dx_TK, dpool


def _change(y_N: torch.Tensor, inner_r: torch.Tensor, pair: Pair, weight: float, bias_N: torch.Tensor | None) -> None:
    """Add one adapter's change to one row, in place."""
    change_N = pair.b_Nr @ inner_r
    if pair.bias_N is not None:
        change_N = change_N + pair.bias_N
    if pair.gain_N is None:
        y_N += weight * pair.scale * change_N
    else:
        bias = 0 if bias_N is None else bias_N
        y_N.copy_(pair.gain_N * (y_N - bias + pair.scale * change_N) + bias)
