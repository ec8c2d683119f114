"""Spherical interpolation of two models along the great circle between their directions.

For the angle `Omega` between the two flattened tensors, `sin((1-t) Omega) / sin(Omega) * theta_0 + sin(t Omega) /
sin(Omega) * theta_1`. Nearly parallel tensors, and zero ones, are interpolated along the straight line.

Shoemake, "Animating rotation with quaternion curves", SIGGRAPH 1985; for model weights as mergekit applies it.
"""

from __future__ import annotations

from math import acos, sin

from toolkit.checkpoints.dtypes import Floats
from toolkit.merge.method import MethodParams, TensorStream
from toolkit.merge.ops import cosines, gram, weighted_sum

TAKES = "weights"
MODELS = (2, 2)
USES_ALL = True
BASE_FIRST = True

PARALLEL = 0.9995
"""Absolute cosine above which the straight line is taken."""


class Params(MethodParams):
    """Parameters of `slerp`.

    Attributes:
        t: 0 gives the first model (the base, where `base_model` names one of the two), 1 the second.
    """

    t: float


def prepare(tensor: TensorStream, params: Params) -> tuple[float, float]:
    """Return the factors of the two models, from the angle between their tensors."""
    norms, angles = cosines(gram(tensor))
    cosine = float(angles[0, 1]) if norms.all() else 1.0
    if abs(cosine) > PARALLEL:
        return 1 - params.t, params.t
    angle = acos(cosine)
    return sin((1 - params.t) * angle) / sin(angle), sin(params.t * angle) / sin(angle)


def combine(x: Floats, params: Params, state: tuple[float, float], start: int) -> Floats:
    """Interpolate one chunk `[2, N]`."""
    return weighted_sum(x, state)
