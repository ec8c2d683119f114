"""A model for given preferences between tasks, with no training: the average of their models by these weights.

`sum_i p_i theta_i` for preferences `p` that add up to 1.

After IBCL, which keeps a distribution of parameters per task and takes, for a preference, their mixture. The mixture's
mean is the weighted average of the means, which is what is written. A mixture is not that one average model, though:
it has a spread, of every task's own distribution (`sigma`, a standard deviation of each weight; 0 where a task is one
point) and of the distance between the tasks' means. The report gives its total variance, so that one can tell how far
the written model is from those that it stands for. The models may come from one folder of compressed deltas.

Lu et al., "IBCL: Zero-shot Model Generation for Task Trade-offs in Continual Learning", 2023 (arXiv:2305.14782).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from toolkit.errors import Problem
from toolkit.merge.learning.session import Outcome, Session
from toolkit.merge.learning.spec import LearnParams, LearnSpec
from toolkit.names import did_you_mean
from toolkit.tables import Table

NEEDS_DATA = False


class Params(LearnParams):
    """Parameters of `preference`.

    Attributes:
        weights: model -> how much its task counts; at least 0, and 1 in all. Models that are not named have 0.
        sigma: model -> standard deviation of each of its weights.
    """

    weights: dict[str, Annotated[float, Field(ge=0)]]
    sigma: dict[str, Annotated[float, Field(ge=0)]] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _on_the_simplex(self) -> Params:
        total = sum(self.weights.values())
        if abs(total - 1) > 1e-6:
            raise ValueError(f"weights: a preference is at least 0 for each task and 1 in all, got {total:g} in all")
        return self


def check(spec: LearnSpec, params: Params) -> list[Problem]:
    """Find preferences for models that are not there."""
    unknown = [(key, name) for key in ("weights", "sigma") for name in getattr(params, key) if name not in spec.models]
    known = ", ".join(spec.models)
    return [
        Problem(f"parameters.{key}.{name}", f"no such model{did_you_mean(name, spec.models)} (known: {known})")
        for key, name in unknown
    ]


def learn(session: Session, params: Params) -> Outcome:
    """Take the preferences as coefficients, and measure how wide the mixture is."""
    vectors = session.vectors
    weights = np.array([params.weights.get(name, 0.0) for name in vectors.names])
    sigmas = [params.sigma.get(name, 0.0) for name in vectors.names]
    products = np.zeros((session.models, session.models))
    for name in vectors.jobs:
        for _, _, x in vectors.slices(name):
            products += x.astype(np.float64) @ x.T
    count = sum(job.tensor.count for job in vectors.jobs.values())
    moments = mixture_moments(weights, products, [sigma**2 * count for sigma in sigmas])
    rows = [[name, value] for name, value in moments.items()]
    table = Table(("mixture of the tasks' models", "squared norm"), rows, digits=4)
    return Outcome(weights[:, None], {"mixture": moments}, [table])


def mixture_moments(
    weights: NDArray[np.float64], products: NDArray[np.float64], variances: Sequence[float]
) -> Mapping[str, float]:
    """Return the moments of a mixture of distributions, summed over all weights of a model.

    Args:
        weights: `[M]`, of the mixture.
        products: `[M, M]`, inner products of the distributions' means, as task vectors.
        variances: `[M]`, total variance of each.

    Returns:
        `mean`, the squared norm of the mixture's mean as a task vector; `within`, the variance of the tasks' own
        distributions; `between`, that of their means; and `variance`, both together.
    """
    mean = float(weights @ products @ weights)
    within = float(weights @ np.asarray(variances))
    between = float(weights @ np.diag(products)) - mean
    return {"mean": mean, "within": within, "between": between, "variance": within + between}
