"""How a choice follows from scores: the best, several, the best for its cost, or the fallback where nothing fits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from toolkit.errors import Problem, SpecError
from toolkit.routing.ops import log_softmax
from toolkit.specs import Spec

Reason = Literal["best", "below the minimum", "not confident", "out of scope"]


class PolicySpec(Spec):
    """How a choice follows from scores.

    Attributes:
        top: experts that a request gets, the best ones.
        temperature: by which scores are divided before they are turned into shares, for `top` and `confidence`.
        costs: expert -> cost of an answer; 0 for others.
        price: score that one unit of cost must bring; `toolkit route calibrate` sets it by a budget.
        minimum: lowest score of the best expert; below it, the fallback.
        confidence: lowest share of the best expert, 0 to 1; below it, the fallback.
        max_novelty: farthest that a prompt may be from those that the router was fitted on, 0 to 2; beyond it, the
            fallback. A router that was fitted with `scope` has one.
        fallback: what answers where nothing fits.
    """

    top: Annotated[int, Field(ge=1)] = 1
    temperature: Annotated[float, Field(gt=0)] = 1.0
    costs: dict[str, float] = Field(default_factory=dict)
    price: float = 0.0
    minimum: float | None = None
    confidence: Annotated[float, Field(ge=0, le=1)] | None = None
    max_novelty: float | None = None
    fallback: str = "base"


@dataclass(frozen=True)
class Choice:
    """What a router chose for one prompt.

    Attributes:
        expert: name of the best, or the fallback.
        scores: of all experts.
        weights: the experts that the policy takes and their shares, which sum to 1.
        reason: why it is this one.
        version: of the router, where a server says which one it was.
    """

    expert: str
    scores: dict[str, float]
    weights: dict[str, float] = field(default_factory=dict)
    reason: Reason = "best"
    version: str = ""

    @property
    def margin(self) -> float | None:
        """How far the best is ahead of the second, where there is one."""
        ranked = sorted(self.scores.values(), reverse=True)
        return ranked[0] - ranked[1] if len(ranked) > 1 else None


def check_policy(policy: PolicySpec, experts: Sequence[str]) -> list[Problem]:
    """Return what of a policy does not fit the experts."""
    known = f"(known: {', '.join(experts)})"
    found = [Problem(f"policy.costs.{n}", f"not an expert {known}") for n in policy.costs if n not in experts]
    if policy.top > len(experts):
        found.append(Problem("policy.top", f"there are {len(experts)} experts, got {policy.top}"))
    return found


def may_fall_back(policy: PolicySpec) -> bool:
    """Tell whether any prompt can go to the fallback."""
    return any(bound is not None for bound in (policy.minimum, policy.confidence, policy.max_novelty))


def values(scores: NDArray[np.float32], experts: Sequence[str], policy: PolicySpec) -> NDArray[np.float64]:
    """Return `[B, N]`: scores less what the answers cost."""
    costs = np.array([policy.costs.get(name, 0.0) for name in experts])
    return scores - policy.price * costs


def decide(
    scores: NDArray[np.float32], experts: Sequence[str], policy: PolicySpec, novelty: NDArray[np.float32] | None = None
) -> list[Choice]:
    """Choose for each prompt; of equals the first.

    Args:
        scores: `[B, N]`.
        experts: `N` names.
        policy: how.
        novelty: `[B]`, how far each prompt is from those that the router knows.
    """
    worth = values(scores, experts, policy)
    best = worth.argmax(axis=1)
    reasons = _reasons(scores, worth, best, policy, novelty)
    choices = []
    for row in range(len(scores)):
        named = dict(zip(experts, map(float, scores[row]), strict=True))
        if reasons[row] == "best":
            weights = _weights(worth[row], experts, policy)
            choices.append(Choice(experts[int(best[row])], named, weights))
        else:
            choices.append(Choice(policy.fallback, named, {policy.fallback: 1.0}, reasons[row]))
    return choices


def _reasons(
    scores: NDArray[np.float32],
    worth: NDArray[np.float64],
    best: NDArray[np.int64],
    policy: PolicySpec,
    novelty: NDArray[np.float32] | None,
) -> list[Reason]:
    reasons: list[Reason] = ["best"] * len(scores)
    rows = np.arange(len(scores))
    tests: list[tuple[Reason, NDArray[np.bool_]]] = []
    if policy.minimum is not None:
        tests.append(("below the minimum", scores[rows, best] < policy.minimum))
    if policy.confidence is not None:
        sure = np.exp(log_softmax(worth / policy.temperature))[rows, best]
        tests.append(("not confident", sure < policy.confidence))
    if policy.max_novelty is not None and novelty is not None:
        tests.append(("out of scope", novelty > policy.max_novelty))
    for reason, fails in tests:
        for row in np.flatnonzero(fails):
            reasons[row] = reason
    return reasons


def _weights(worth: NDArray[np.float64], experts: Sequence[str], policy: PolicySpec) -> dict[str, float]:
    order = np.argsort(-worth, kind="stable")[: policy.top]
    shares = np.exp(log_softmax(worth[None, order] / policy.temperature))[0]
    return {experts[int(i)]: float(share) for i, share in zip(order, shares, strict=True)}


def price_for(scores: NDArray[np.float32], costs: NDArray[np.float64], budget: float, *, exact: bool = False) -> float:
    """Return the price of cost at which the mean cost of the choices is the budget or just below.

    Args:
        scores: `[B, N]`, of prompts as they will come.
        costs: `[N]`.
        budget: mean cost per request.
        exact: also make choices dearer, by a negative price, where the best ones cost less than the budget.

    Raises:
        SpecError: even the cheapest choices cost more.
    """
    cheapest = float(costs.min())
    if budget < cheapest:
        raise SpecError(f"a budget of {budget:g} per request, but the cheapest expert costs {cheapest:g}")
    steps = np.diff(np.unique(costs))
    if not steps.size or (not exact and spent(scores, costs, 0.0) <= budget):
        return 0.0
    reach = 1.0 + 2 * float(np.ptp(scores)) / float(steps.min())
    low, high = -reach if exact else 0.0, reach
    if spent(scores, costs, low) <= budget:
        return low
    for _ in range(100):  # the bits of a double, and some
        middle = (low + high) / 2
        low, high = (low, middle) if spent(scores, costs, middle) <= budget else (middle, high)
    return high


def spent(scores: NDArray[np.float32], costs: NDArray[np.float64], price: float) -> float:
    """Return the mean cost of the choices at a price."""
    return float(costs[(scores - price * costs).argmax(axis=1)].mean())


def counted(choices: Sequence[Choice]) -> Mapping[str, int]:
    """Return how often each expert was chosen, by name."""
    names, counts = np.unique([choice.expert for choice in choices], return_counts=True)
    return dict(zip(map(str, names), map(int, counts), strict=True))
