"""Robust Weight Signatures: patch a model with what training on corrupted data changes, the task itself left out.

The signature of a model trained on corrupted data is its delta minus the projection of this on the delta of a model
trained on clean data, both from common initial weights `theta_0`, the base. The result is

    theta + sum_i weight_i * (tau_i - <tau_i, tau_clean> / <tau_clean, tau_clean> * tau_clean)

where `theta` is the clean model, or one of role `target` that needs the patch; a negative weight takes a signature
out again. The authors' code multiplies by the weight twice, once before the projection and once after; here it
counts once. They project each tensor on its own.

Their code takes the parameters and the statistics of batch norms from the mean of the models trained on corrupted
data; `patch: mean` under a filter does so.

Cai et al., "Robust Weight Signatures: Gaining Robustness as Easy as Patching Weights?", 2023 (arXiv:2302.12480).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, field_validator

from toolkit.checkpoints.dtypes import Floats
from toolkit.checkpoints.layout import layer_of, role_of
from toolkit.merge.method import MethodParams, TensorStream
from toolkit.merge.ops import gram, weighted_sum

TAKES = "deltas"
MODELS = (2, None)

Role = Literal["clean", "corrupt", "target"]


class Params(MethodParams):
    """Parameters of `signatures`.

    Attributes:
        role: of each model: one is `clean`, at least one is `corrupt`, and one may be the `target` that is patched,
            which is else the clean one.
        weight: of each model's signature; that of models without one does not matter.
        keep_layers: layers of each stack that are patched, the first ones, with the embeddings before them; all
            tensors where not given, none where 0.
        projection: on the clean delta of each `tensor`, or on that of all tensors that are patched, the `model`.
        patch: add the `signature`; or take the `mean` of the corrupt models, whatever layer it is.
    """

    role: tuple[Role, ...]
    weight: tuple[float, ...] = (1.0,)
    keep_layers: int | None = Field(None, ge=0)
    projection: Literal["tensor", "model"] = "tensor"
    patch: Literal["signature", "mean"] = "signature"

    @field_validator("role")
    @classmethod
    def _check_role(cls, role: tuple[Role, ...]) -> tuple[Role, ...]:
        if role.count("clean") != 1 or role.count("target") > 1 or "corrupt" not in role:
            raise ValueError(f"needs one clean model, one corrupt or more, and at most one target; got {list(role)}")
        return role


def survey(tensors: Sequence[tuple[TensorStream, Params]]) -> list[NDArray[np.float64] | None]:
    """Find the inner products of the deltas over all tensors whose projection is of the whole model."""
    chosen = [_is_patched(tensor.name, params) and params.projection == "model" for tensor, params in tensors]
    products = [gram(tensor) for (tensor, _), whole in zip(tensors, chosen, strict=True) if whole]
    total = np.sum(products, axis=0) if products else None
    return [total if whole else None for whole in chosen]


def prepare(tensor: TensorStream, params: Params) -> list[float]:
    """Return the factor of each model's delta in the merged one."""
    corrupt = [role == "corrupt" for role in params.role]
    if params.patch == "mean":
        return [taken / sum(corrupt) for taken in corrupt]
    factors = [float(role == _patched_role(params)) for role in params.role]
    if not _is_patched(tensor.name, params):
        return factors
    products = gram(tensor) if tensor.surveyed is None else tensor.surveyed
    clean = params.role.index("clean")
    square = products[clean, clean]
    for model, (taken, weight) in enumerate(zip(corrupt, params.weight, strict=True)):
        if taken:
            factors[model] += weight
            factors[clean] -= weight * float(products[model, clean] / square) if square else 0.0
    return factors


def combine(x: Floats, params: Params, state: list[float], start: int) -> Floats:
    """Add up one slice of deltas `[M, N]`."""
    return weighted_sum(x, state)


def _patched_role(params: Params) -> Role:
    return "target" if "target" in params.role else "clean"


def _is_patched(name: str, params: Params) -> bool:
    """Tell whether a tensor gets the signatures."""
    if params.patch == "mean" or params.keep_layers == 0:
        return False
    if params.keep_layers is None:
        return True
    layer = layer_of(name)
    return role_of(name) == "embedding" if layer is None else layer[1] < params.keep_layers
