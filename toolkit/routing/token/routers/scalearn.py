"""ScaLearn's uniform scales: every expert at every token, each times the number that was learned for its linear.

The adapters' outputs are summed as they are scaled, `y + sum_s w_s (o_s - y)`; scales need not add up to 1. A folder
that `adapter: {method: scalearn, uniform: true}` trained is served over the adapters it was trained on, which other
requests share. Scales that are vectors are no weights of rows; such a folder is served as an adapter of its own.

Frohmann et al., "ScaLearn: Simple and Highly Parameter-Efficient Task Transfer by Learning to Scale", 2023,
arXiv:2310.01217.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from toolkit.errors import UnsupportedError
from toolkit.routing.token.ops import Choice
from toolkit.specs import Spec

_SCALE = re.compile(r"^base_model\.model\.(.*)\.scalearn_rules\.fuse_0\.scale$")
_SOURCE = re.compile(r"^base_model\.model\.(.*)\.scalearn_sources\.of_(.*?)\.")


class Params(Spec):
    """ScaLearn has no parameters."""


def route(x_TK: Tensor, vectors_EK: Tensor, params: Params) -> Choice:
    """Return all experts with their scales, `vectors_EK` `[E, 1]`."""
    index = torch.arange(len(vectors_EK), device=x_TK.device)
    return index.expand(len(x_TK), -1), vectors_EK[:, 0].expand(len(x_TK), -1)


def read(sources: list[str], tensors: Mapping[str, Tensor], where: str) -> dict[str, dict[str, Tensor]]:
    """Return the scale `[1]` of every source at every linear, as a trained folder has them.

    Args:
        sources: their names, in order.
        tensors: of the folder.
        where: what errors call it.

    Raises:
        UnsupportedError: the scales are vectors.
    """
    scales = {found[1]: value.float() for name, value in tensors.items() if (found := _SCALE.match(name))}
    if any(value.shape[1] != 1 for value in scales.values()):
        raise UnsupportedError(f"{where}: its scales are vectors; serve the folder as an adapter instead")
    present = sorted({(found[1], found[2]) for name in tensors if (found := _SOURCE.match(name))})
    shared = next(iter(scales.values()))  # the only ones, where all linears have them in common
    sites: dict[str, dict[str, Tensor]] = {}
    for site, source in present:
        sites.setdefault(site, {})[source] = scales.get(site, shared)[sources.index(source)]
    return sites
