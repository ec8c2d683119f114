"""Dynamic logits fusion: at each step, weights that move the large model as far as fine-tuning moved the small ones.

Fan et al., "On giant's shoulders: effortless weak to strong by dynamic logits fusion", 2024. With `P` of the large
model, `Q` of the small base, `Q_t` of the experts and `F = softmax(large + sum_t a_t (expert_t - base))`, the weights
minimise

    sum_t (KL(F || P) - KL(Q_t || Q))^2 + (KL(P || F) - KL(Q || Q_t))^2

over a grid from 0 to 2. Of several experts one is taken at each step, the one with the least of this sum, so that the
time grows with their number and not with a power of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from toolkit.errors import Problem, SpecError
from toolkit.routing.fusion.arithmetic import divergence, fused
from toolkit.specs import Spec

if TYPE_CHECKING:
    from torch import Tensor

MOST_POINTS = 20_000
"""Of one grid over several experts."""


class Params(Spec):
    """Parameters of `dynamic_logits_fusion`.

    Attributes:
        upper: largest weight.
        steps: parts that the range of a weight is divided into.
        rounds: grids; each after the first divides the two parts beside the best point so far.
        experts: `one` at each step, or `all`, with a grid over all weights at once.
    """

    upper: Annotated[float, Field(gt=0)] = 2.0
    steps: Annotated[int, Field(ge=1)] = 20
    rounds: Annotated[int, Field(ge=1)] = 1
    experts: Literal["one", "all"] = "one"


def check(experts: Sequence[str], params: Params) -> None:
    """Raise a `SpecError` where the parameters do not fit the experts."""
    points = (params.steps + 1) ** len(experts)
    if params.experts == "all" and points > MOST_POINTS:
        message = f"{points:,} points at every step for {len(experts)} experts; take experts: one, or fewer steps"
        raise SpecError([Problem("steps", message)])


def weights(large: Tensor, base: Tensor, experts: Tensor, names: Sequence[str], params: Params) -> Tensor:
    """Return the weights, `[B, T]` float32; of equally good ones the smallest, of equally good experts the first.

    Args:
        large: `[B, V]` logits of the large model.
        base: `[B, V]` logits of the small base.
        experts: `[T, B, V]` logits of the experts.
        names: of the experts.
        params: of the search.
    """
    import torch

    directions = experts - base
    targets = _targets(base, experts)
    if params.experts == "all":
        return _search(large, directions, targets, params)[0]
    found = [_search(large, direction[None], targets, params) for direction in directions]
    best = torch.stack([gap for _, gap in found]).argmin(dim=0)
    alone = torch.cat([alpha for alpha, _ in found], dim=1)
    return alone * torch.nn.functional.one_hot(best, len(found))


def _targets(base: Tensor, experts: Tensor) -> tuple[Tensor, Tensor]:
    """Return how far each expert is from the small base, and the base from it, `[T, B]` nats each."""
    q, tuned = base.log_softmax(-1), experts.log_softmax(-1)
    return divergence(tuned, q), divergence(q.expand_as(tuned), tuned)


def _search(large: Tensor, directions: Tensor, targets: tuple[Tensor, Tensor], params: Params) -> tuple[Tensor, Tensor]:
    """Return the best weights of some directions `[S, B, V]`, `[B, S]`, and the objective there, `[B]`."""
    import torch

    rows, size = large.shape[0], len(directions)
    parts = torch.linspace(0, 1, params.steps + 1, device=large.device)
    grid = torch.cartesian_prod(*[parts] * size).reshape(-1, size)
    low, width = large.new_zeros(rows, size), params.upper
    best, least = low, large.new_full((rows,), torch.inf)
    for _ in range(params.rounds):
        for point in grid:
            alpha = low + width * point
            gap = _objective(large, fused(large, directions, alpha), targets)
            best, least = torch.where((gap < least)[:, None], alpha, best), torch.minimum(gap, least)
        step = width / params.steps
        width = min(2 * step, params.upper)
        low = (best - step).clamp(0, params.upper - width)
    return best, least


def _objective(large: Tensor, logits: Tensor, targets: tuple[Tensor, Tensor]) -> Tensor:
    """Return the sum that is minimised, `[B]`."""
    p, mixed = large.log_softmax(-1), logits.log_softmax(-1)
    there, back = divergence(mixed, p), divergence(p, mixed)
    return ((there - targets[0]) ** 2 + (back - targets[1]) ** 2).sum(dim=0)
