"""Move the base towards another model by at most `t` per element: `theta_0 + clip(theta_1 - theta_0, -t, t)`.

Where the two are closer than `t` the result is the other model. The method is alchemonaut's
(huggingface.co/alchemonaut/QuartetAnemoi-70B-t0.0001), which interpolates by `min(1, t / |theta_1 - theta_0|)`; this is
the same.
"""

from __future__ import annotations

import numpy as np
from pydantic import Field

from toolkit.checkpoints.dtypes import Floats
from toolkit.merge.method import MethodParams

TAKES = "weights"
MODELS = (2, 2)
BASE_FIRST = True


class Params(MethodParams):
    """Parameters of `nearswap`.

    Attributes:
        t: largest change of an element of the first model (the base, where `base_model` names one of the two).
    """

    t: float = Field(ge=0)


def combine(x: Floats, params: Params, state: None, start: int) -> Floats:
    """Merge one chunk `[2, N]`."""
    base, other = x
    t = np.float32(params.t)
    lowest = base - t
    np.minimum(other, np.add(base, t, out=base), out=other)
    return np.maximum(other, lowest, out=other)
