"""DARE: drop elements of each delta at random, make the rest larger, add the deltas up.

With masks `b_i` whose elements are 1 with probability `p` (`density`): `theta_0 + lambda * sum_i w_i r_i b_i * d_i`,
where `r_i` is `1 / p`, or `sum |d_i| / sum |b_i * d_i|`.

Yu et al., "Language Models are Super Mario: Absorbing Abilities from Homologous Models as a Free Lunch", 2023
(arXiv:2311.03099). The paper and PEFT divide what is kept by the density, so that the mean over masks is the delta;
mergekit keeps the tensor's L1 norm instead.
"""

from __future__ import annotations

from math import prod

from toolkit.checkpoints.dtypes import Floats
from toolkit.merge.method import TensorStream
from toolkit.merge.methods import task_arithmetic
from toolkit.merge.methods._dare import DareParams, RandomMask, drop_all, masks
from toolkit.merge.methods._remembered import remembered_bytes

TAKES = "deltas"
MODELS = (1, None)


class Params(DareParams, task_arithmetic.Params):
    """Parameters of `dare_linear`: those of dropping at random, and those of `task_arithmetic`."""

    PRESETS = {
        "mergekit": {"rescale_by": "norm"},
        "paper": {"rescale_by": "density"},
        "peft": {"rescale_by": "density"},
    }


def prepare(tensor: TensorStream, params: Params) -> list[RandomMask]:
    """Return the mask of each model."""
    return masks(tensor, params)


def combine(x: Floats, params: Params, state: list[RandomMask], start: int) -> Floats:
    """Drop, rescale and add up one slice of deltas `[M, N]`."""
    return task_arithmetic.combine(drop_all(state, x, start), params, None, start)


def memory(shape: tuple[int, ...], models: int) -> int:
    """Return what the masks take that one pass makes and the next one needs."""
    return remembered_bytes(prod(shape) * models)
