"""Normal and uniform numbers that depend on a key and a position alone; see `toolkit.merge.random`."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from toolkit.checkpoints.dtypes import Floats
from toolkit.merge.random import Draws


def uniforms(draws: Draws, start: int, stop: int) -> NDArray[np.float64]:
    """Return one number of (0, 1) for each of the elements `start` to `stop`."""
    return (draws.bits(start, stop).astype(np.float64) + 0.5) / 2.0**32


def normals(draws: Draws, start: int, stop: int) -> Floats:
    """Return one standard normal number for each of the elements `start` to `stop` (Box and Muller, 1958)."""
    radius = np.sqrt(-2 * np.log(uniforms(draws, start, stop)))
    angle = 2 * np.pi * uniforms(replace(draws, tensor=f"{draws.tensor}\0angle"), start, stop)
    return (radius * np.cos(angle)).astype(np.float32)
