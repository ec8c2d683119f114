"""LoraHub: a few weights for LoRAs of other tasks, found without gradients from a few examples of a new one.

`theta_0 + sum_i c_i d_i` with the `c` that make `loss(c) + penalty * mean_i |c_i|` least.

The objective is the mean loss on the examples, with `penalty` times the mean absolute weight. Candidates are found by
CMA-ES between -1.5 and 1.5. The authors add up the factors A and the factors B of equally shaped LoRAs, which mixes
A of one with B of another; here their changes are added, so that ranks may differ and full fine-tunes take part.

Huang et al., "LoraHub: Efficient Cross-Task Generalization via Dynamic LoRA Composition", 2023 (arXiv:2307.13269).
"""

from __future__ import annotations

from typing import Annotated, Literal

import numpy as np
from pydantic import Field, field_validator

from toolkit.merge.learning.session import Outcome, Session
from toolkit.merge.learning.spec import CoefficientParams, Loss
from toolkit.tables import Table


class Params(CoefficientParams):
    """Parameters of `lorahub`.

    Attributes:
        steps: candidates that are measured, the start among them.
        sigma: first standard deviation of CMA-ES.
        penalty: factor of the mean absolute coefficient.
    """

    start: float | None = 0.0
    bounds: Literal["free", "clamp", "simplex"] = "clamp"
    low: float = -1.5
    high: float = 1.5
    loss: Loss = "cross_entropy"
    steps: Annotated[int, Field(ge=1)] = 40
    sigma: Annotated[float, Field(gt=0)] = 0.5
    penalty: Annotated[float, Field(ge=0)] = 0.05

    @field_validator("loss")
    @classmethod
    def _measured(cls, value: Loss) -> Loss:
        if value == "distillation":
            raise ValueError("lorahub composes for a new task, which has no model to learn from")
        return value


def learn(session: Session, params: Params) -> Outcome:
    """Search the coefficients; every candidate is measured on all rows."""
    from toolkit.merge.learning.evolve import evolve
    from toolkit.merge.learning.objective import mean_loss

    def measure(values: np.ndarray) -> float:
        return mean_loss(session, values) + params.penalty * float(np.abs(values).mean())

    start = params.start_of(session.models)
    values, found = evolve(
        session,
        measure,
        start=start,
        low=params.low,
        high=params.high,
        sigma=params.sigma,
        budget=params.steps,
        seed=params.seed,
    )
    rows = [["start", found[0]], ["best", min(found)]]
    table = Table(("candidate", "loss and penalty"), rows, f"{len(found)} candidates", 4)
    return Outcome(values, {"steps": len(found), "losses": found}, [table], "texts and labels")
