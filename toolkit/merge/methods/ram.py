"""Reinforced Agent Merging: keep what one model alone changed, average what several changed.

`theta_0 + sum_i d_i [|d_i| > epsilon] / max(1, count)` element by element, `count` being the number of models with
`|d_i| > epsilon`.

"Reinforced Agent Merging", 2026 (arXiv:2601.13572): fine-tuning by reinforcement changes few parameters, mostly others
in each model, and a mean over all models would shrink what is one model's own.
"""

from __future__ import annotations

from toolkit.checkpoints.dtypes import Floats
from toolkit.merge.methods._ram import RamParams, drop_unchanged, mean_of_changes

TAKES = "deltas"
MODELS = (1, None)


class Params(RamParams):
    """Parameters of `ram`: that of telling a change from none."""


def combine(x: Floats, params: Params, state: None, start: int) -> Floats:
    """Merge one slice of deltas `[M, N]`."""
    count = drop_unchanged(x, params.epsilon)
    return mean_of_changes(x, count)
