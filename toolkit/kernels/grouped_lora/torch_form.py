"""Matrix products at each adapter's true rank, added to the output in place.

Adapters with few rows each or with equally many, and those that rows mix, go through products of stacked copies
(`stacks`); others through a product with the first factors of all linears and one with each second factor.
"""

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
        pair = pairs[segment.adapter]
        inner_Tr = torch.mm(x_TK[segment.start : segment.stop], pair.a_rK.T)
        _change(y_TN[segment.start : segment.stop], inner_Tr, pair, segment.weight, bias_N)


def paged_lora(
    ys: Sequence[torch.Tensor],
    x: torch.Tensor,
    routes: Routes,
    pairs: PagedPairs,
    biases: Sequence[torch.Tensor | None],
) -> None:
    """See the api."""
    if routes.mixture is not None:
        for stack, columns in pairs.stacks.of_mixture(routes.slots):
            stack.mix(ys, x, routes.mixture[:, :, columns])
        return
    stacked: set[int] = set()
    if x.dim() == 2:
        for stack, gathered in pairs.stacks.choose(routes):
            stack.add(ys, x, gathered)
            stacked.update(stack.slots)
    if len(stacked) == len(routes.by_slot):
        return
    for start, stop, slot, weight in routes.segments:
        if slot in stacked or slot not in pairs.versions:
            continue
        rows, a_KR, at = x[start:stop], pairs.first_factors(slot).T, 0
        inner_TR = torch.mm(rows, a_KR) if x.dim() == 2 else a_KR[rows]
        for linear, (rank, y_TN) in enumerate(zip(pairs.ranks_of(slot), ys, strict=True)):
            pair = pairs.pair(slot, linear)
            if pair is not None:
                _change(y_TN[start:stop], inner_TR[:, at : at + rank], pair, weight, biases[linear])
                at += rank


def _change(y_TN: torch.Tensor, inner_Tr: torch.Tensor, pair: Pair, weight: float, bias_N: torch.Tensor | None) -> None:
    """Add one adapter's change to some rows, in place."""
    y_TN.addmm_(inner_Tr, pair.b_Nr.T, alpha=weight * pair.scale)
    if pair.bias_N is not None:
        y_TN.add_(pair.bias_N, alpha=weight * pair.scale)
    if pair.gain_N is not None and bias_N is not None:
        y_TN.sub_(bias_N).mul_(pair.gain_N).add_(bias_N)
    elif pair.gain_N is not None:
        y_TN.mul_(pair.gain_N)
