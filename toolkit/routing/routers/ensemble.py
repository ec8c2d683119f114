"""The weighted mean of other routers' scores: errors of different kinds of routers cancel in part.

`score_e(x) = sum_k w_k score_{k,e}(x) / sum_k w_k` over the members `k`, as in stacking (Wolpert, "Stacked
generalization", 1992) with weights that are given and not learned.
"""

from __future__ import annotations

from typing import Annotated, Any

import numpy as np
from pydantic import Field

from toolkit import names
from toolkit.errors import CheckpointError
from toolkit.routing.examples import Examples
from toolkit.routing.fit import fit_state, parameters
from toolkit.routing.ops import State, Vectors, check_arrays, inside, within
from toolkit.routing.router import ROUTERS, kind_module
from toolkit.specs import Spec

SCORES = "quality"


class Member(Spec):
    """One of the routers.

    Attributes:
        weight: of its scores.
        parameters: of its kind.
    """

    weight: Annotated[float, Field(gt=0)] = 1.0
    parameters: dict[str, Any] = Field(default_factory=dict)


class Params(Spec):
    """Parameters of `ensemble`.

    Attributes:
        members: kind of router -> how it takes part; their scores should be of one scale, such as predicted quality.
    """

    members: Annotated[dict[str, Member], Field(min_length=1)] = Field(
        default_factory=lambda: {"knn": Member(), "linear": Member()}
    )


def fit(vectors: Vectors, examples: Examples, params: Params) -> dict[str, Vectors]:
    """Fit every member on the same examples."""
    total = sum(member.weight for member in params.members.values())
    state: dict[str, Vectors] = {}
    for kind, member in params.members.items():
        module = kind_module(kind)
        own = parameters(module, member.parameters, f"parameters.members.{kind}.parameters")
        state |= within(kind, fit_state(module, own, vectors, examples))
        state[f"{kind}.share"] = np.array([member.weight / total], np.float32)
    return state


def score(vectors: Vectors, state: State) -> Vectors:
    """Return the weighted mean of the members' scores."""
    found = [state[f"{kind}.share"] * kind_module(kind).score(vectors, inside(state, kind)) for kind in _kinds(state)]
    return np.stack(found).sum(axis=0)


def check(state: State, num_experts: int) -> None:
    """Check every member's arrays."""
    if not state:
        raise CheckpointError("there are no members")
    for kind in _kinds(state):
        if kind not in names.available(ROUTERS):
            raise CheckpointError(f"{kind!r} is no router")
        check_arrays(state, {f"{kind}.share": (1,)})
        kind_module(kind).check(inside(state, kind), num_experts)


def _kinds(state: State) -> list[str]:
    return sorted({name.partition(".")[0] for name in state})
