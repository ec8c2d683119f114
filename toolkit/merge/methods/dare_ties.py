"""DARE with sign consensus: drop elements of each delta at random, make the rest larger, merge what agrees in sign.

Yu et al., "Language Models are Super Mario: Absorbing Abilities from Homologous Models as a Free Lunch", 2023
(arXiv:2311.03099), merged as in Yadav et al., "TIES-Merging", 2023 (arXiv:2306.01708). Tools of the field differ in
what they multiply by, how they vote and what they divide by; each choice is a parameter here, and a preset names
those of the paper, of mergekit and of PEFT.
"""

from __future__ import annotations

from math import prod

from toolkit.checkpoints.dtypes import Floats
from toolkit.merge.method import TensorStream
from toolkit.merge.methods._dare import DareParams, RandomMask, masks
from toolkit.merge.methods._remembered import remembered_bytes
from toolkit.merge.methods._sign_consensus import ConsensusParams, merge_by_consensus

TAKES = "deltas"
MODELS = (1, None)


class Params(DareParams, ConsensusParams):
    """Parameters of `dare_ties`: those of dropping at random, and those of a sign consensus."""

    PRESETS = {
        "mergekit": {"rescale_by": "norm", "vote": "weighted", "divisor": "weights", "normalize": False},
        "paper": {"rescale_by": "density", "vote": "total", "divisor": "count", "normalize": True},
        "peft": {"rescale_by": "density", "vote": "total", "divisor": "count", "normalize": True},
    }


def prepare(tensor: TensorStream, params: Params) -> list[RandomMask]:
    """Return the mask of each model."""
    return masks(tensor, params)


def combine(x: Floats, params: Params, state: list[RandomMask], start: int) -> Floats:
    """Drop, rescale and merge one slice of deltas `[M, N]`."""
    for row, mask in zip(x, state, strict=True):
        mask.drop_and_rescale(row, start)
    return merge_by_consensus(x, params)


def memory(shape: tuple[int, ...], models: int) -> int:
    """Return what the masks take that one pass makes and the next one needs."""
    return remembered_bytes(prod(shape) * models)
