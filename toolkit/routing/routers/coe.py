"""Composition of Experts: first the category of a prompt, then the expert that was measured best on that category.

Jain et al., "Composition of experts: a modular compound AI system leveraging large language models", 2024. Which
single prompts an expert gets right is too jittery to learn; which categories it is good at is not. Which experts are
kept is a mixed-integer linear programme: the largest sum over categories of the chosen experts' quality, with the sizes
of all experts that are chosen anywhere within a budget. Where the category is not clear, a general expert answers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from toolkit import names
from toolkit.errors import CheckpointError, Problem, SpecError
from toolkit.names import did_you_mean
from toolkit.routing.examples import Examples
from toolkit.routing.fit import fit_state, parameters
from toolkit.routing.ops import State, Vectors, check_arrays, inside, log_softmax, size, within
from toolkit.routing.router import ROUTERS, kind_module
from toolkit.specs import Spec

SCORES = "quality"


class Params(Spec):
    """Parameters of `coe`.

    Attributes:
        classifier: kind of router that tells categories apart.
        classifier_parameters: of that kind.
        sizes: expert -> its size, such as billions of parameters; needed for a budget.
        budget: most that the sizes of all experts in use may sum to.
        general: expert for prompts of no clear category; by default the best on average among those in use. It may
            be one that the budget left out, whose size then comes on top.
        uncertainty: entropy of the category, in nats, from which on the general expert answers: 0 always, none never.
    """

    classifier: str = "linear"
    classifier_parameters: dict[str, Any] = Field(default_factory=dict)
    sizes: dict[str, Annotated[float, Field(gt=0)]] = Field(default_factory=dict)
    budget: Annotated[float, Field(gt=0)] | None = None
    general: str | None = None
    uncertainty: Annotated[float, Field(ge=0)] | None = None


def fit(vectors: Any, examples: Examples, params: Params) -> dict[str, Vectors]:
    """Learn the categories, average the experts' quality in each, and choose the experts in use.

    Raises:
        SpecError: names that are no experts', no size of one, or a budget below every size.
    """
    _check_names(params, examples.experts)
    categories = examples.of_categories()
    module = kind_module(params.classifier)
    own = parameters(module, params.classifier_parameters, "parameters.classifier_parameters")
    classifier = fit_state(module, own, vectors, categories)
    if examples.labelled:
        quality = np.eye(len(examples.experts))[[examples.experts.index(name) for name in categories.experts]]
    else:
        quality = np.array([examples.category_means()[name] for name in categories.experts])
    sizes = np.array([params.sizes.get(name, 1.0) for name in examples.experts])
    used = mapping(quality, sizes, np.inf if params.budget is None else params.budget)
    means = np.nanmean(examples.quality, axis=0)
    general = examples.experts.index(params.general) if params.general else max(set(used), key=lambda i: means[i])
    limit = np.inf if params.uncertainty is None else params.uncertainty
    settings = [general, min(limit, float(np.finfo(np.float32).max))]
    in_use = np.isin(np.arange(len(sizes)), [*used, general])
    # An expert that is not in use is never the best of a category.
    allowed = np.where(in_use, quality, quality.min() - 1)
    state = {"quality": allowed.astype(np.float32), "settings": np.array(settings, np.float32)}
    return state | within(params.classifier, classifier)


def score(vectors: Any, state: State) -> Vectors:
    """Return the experts' quality on the category of each prompt; of an unclear one, the general expert is best."""
    kind = _classifier(state)
    shares = log_softmax(kind_module(kind).score(vectors, inside(state, kind)))
    entropy = np.maximum(-(np.exp(shares) * shares).sum(axis=1), 0)
    scores = state["quality"][shares.argmax(axis=1)]
    general, limit = int(state["settings"][0]), state["settings"][1]
    scores[entropy >= limit, general] = state["quality"].max() + 1
    return scores


def check(state: State, num_experts: int) -> None:
    """Check that the arrays are all there, finite, and of sizes that fit each other and the experts."""
    check_arrays(state, {"quality": (-1, num_experts), "settings": (2,)})
    kind = _classifier(state)
    if kind not in names.available(ROUTERS):
        raise CheckpointError(f"{kind!r} is no router that could tell categories apart")
    kind_module(kind).check(inside(state, kind), size(state, "quality", 0))
    if not 0 <= state["settings"][0] < num_experts:
        raise CheckpointError("settings names a general expert that is not there")


def mapping(quality: NDArray[np.float64], sizes: NDArray[np.float64], budget: float) -> list[int]:
    """Return the expert of each category: the largest total quality within the budget.

    Args:
        quality: `[C, N]`, mean quality of each expert by category.
        sizes: `[N]`.
        budget: most that the sizes of the experts in use may sum to.

    Raises:
        SpecError: the budget is below every size.
    """
    if sizes.min() > budget:
        message = f"the smallest expert has size {sizes.min():g}, which is more than {budget:g}"
        raise SpecError([Problem("parameters.budget", message)])
    kept = np.ones(len(sizes), bool) if sizes.sum() <= budget else _kept(quality, sizes, budget)
    return [int(i) for i in np.where(kept, quality, -np.inf).argmax(axis=1)]


def _kept(quality: NDArray[np.float64], sizes: NDArray[np.float64], budget: float) -> NDArray[np.bool_]:
    """Solve for `[N]` of which experts are used; `x[c, n]` is 1 where category `c` has expert `n`."""
    from scipy.optimize import Bounds, LinearConstraint, milp

    count, num_experts = quality.shape
    one_each = np.hstack([np.kron(np.eye(count), np.ones(num_experts)), np.zeros((count, num_experts))])
    only_used = np.hstack([np.eye(count * num_experts), -np.tile(np.eye(num_experts), (count, 1))])
    within_budget = np.concatenate([np.zeros(count * num_experts), sizes])
    found = milp(
        np.concatenate([-quality.ravel(), np.zeros(num_experts)]),
        integrality=np.concatenate([np.zeros(count * num_experts), np.ones(num_experts)]),
        bounds=Bounds(0, 1),
        constraints=[
            LinearConstraint(one_each, 1, 1),
            LinearConstraint(only_used, -np.inf, 0),
            LinearConstraint(within_budget[None], -np.inf, budget),
        ],
        options={"mip_rel_gap": 0},
    )
    assert found.x is not None, found.message
    return found.x[-num_experts:] > 0.5


def _classifier(state: State) -> str:
    return next((name.partition(".")[0] for name in sorted(state) if "." in name), "")


def _check_names(params: Params, experts: tuple[str, ...]) -> None:
    given: Mapping[str, str] = {f"sizes.{name}": name for name in params.sizes}
    given = dict(given) | ({"general": params.general} if params.general else {})
    unknown = {where: name for where, name in given.items() if name not in experts}
    found = [Problem(f"parameters.{w}", f"not an expert{did_you_mean(n, experts)}") for w, n in unknown.items()]
    missing = [name for name in experts if name not in params.sizes] if params.budget is not None else []
    found += [Problem("parameters.sizes", f"a budget needs the size of {name}") for name in missing]
    if found:
        raise SpecError(found)
