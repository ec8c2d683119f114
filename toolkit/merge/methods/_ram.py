"""What `ram` and `ramplus_tl` share: which models change an element."""

from __future__ import annotations

from typing import Annotated

import numpy as np
from pydantic import Field

from toolkit.checkpoints.dtypes import Floats
from toolkit.merge.method import MethodParams


class RamParams(MethodParams):
    """Parameters of telling a change from none.

    Attributes:
        epsilon: magnitude up to which an element of a delta counts as unchanged, and is dropped.
    """

    epsilon: Annotated[float, Field(ge=0)] = 1e-5


def drop_unchanged(x: Floats, epsilon: float) -> Floats:
    """Zero what counts as unchanged in deltas `x` `[M, N]`; return how many models change each element, `[N]`."""
    count = np.zeros(x.shape[1], np.float32, like=x)
    for row in x:
        changed = (np.abs(row) > np.float32(epsilon)).astype(np.float32)
        np.multiply(row, changed, out=row)
        np.add(count, changed, out=count)
    return count


def mean_of_changes(x: Floats, count: Floats) -> Floats:
    """Return the mean over the models that change an element, `[N]`; 0 where none does."""
    total = x.sum(axis=0)
    return np.divide(total, np.maximum(count, 1), out=total)
