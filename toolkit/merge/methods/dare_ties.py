"""DARE with sign consensus: drop elements of each delta at random, make the rest larger, merge what agrees in sign.

With `m_i = r_i b_i * d_i` as in `dare_linear`: `theta_0 + lambda * sum_i w_i m_i [sign m_i = s]` with
`s = sign(sum_i w_i m_i)`, divided by the weights or the number of those that agree where `normalize` is set.

Yu et al., "Language Models are Super Mario: Absorbing Abilities from Homologous Models as a Free Lunch", 2023
(arXiv:2311.03099), merged as in Yadav et al., "TIES-Merging", 2023 (arXiv:2306.01708). Tools of the field differ in
what they multiply by, how they vote and what they divide by; each choice is a parameter here, and a preset names
those of the paper, of mergekit and of PEFT.
"""

from __future__ import annotations

from functools import partial
from math import prod

from toolkit.checkpoints.dtypes import Floats
from toolkit.merge.method import TensorStream
from toolkit.merge.methods._dare import DareParams, RandomMask, drop_all, masks
from toolkit.merge.methods._remembered import remembered_bytes
from toolkit.merge.methods._sign_consensus import ConsensusParams, merge_by_consensus, sign_of_ties

TAKES = "deltas"
MODELS = (1, None)


_COUNTED = {"rescale_by": "density", "vote": "total", "divisor": "count", "normalize": True}


class Params(DareParams, ConsensusParams):
    """Parameters of `dare_ties`: those of dropping at random, and those of a sign consensus."""

    PRESETS = {
        "mergekit": {"rescale_by": "norm", "vote": "weighted", "divisor": "weights", "normalize": False},
        "paper": _COUNTED | {"zero_vote": "majority"},
        "peft": _COUNTED,
    }


State = tuple[list[RandomMask], float]


def prepare(tensor: TensorStream, params: Params) -> State:
    """Return the mask of each model, and the sign of elements without a vote."""
    found = masks(tensor, params)
    return found, sign_of_ties(tensor, params, partial(drop_all, found))


def combine(x: Floats, params: Params, state: State, start: int) -> Floats:
    """Drop, rescale and merge one slice of deltas `[M, N]`."""
    found, zero = state
    return merge_by_consensus(drop_all(found, x, start), params, zero)


def memory(shape: tuple[int, ...], models: int) -> int:
    """Return what the masks take that one pass makes and the next one needs."""
    return remembered_bytes(prod(shape) * models)
