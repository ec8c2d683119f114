"""Which tokens of a batch a penalty is a mean over."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from toolkit.data.render import IGNORED

if TYPE_CHECKING:
    from toolkit.adapters.loop import AdapterTrainer


def real(batch: Mapping[str, Any]) -> Tensor:
    """Tell which tokens of a batch stand before the last trained one of their row or are it, `[B, T]` bool."""
    trained = batch["labels"] != IGNORED
    return trained.flip(1).cummax(1).values.flip(1)


def count_real(trainer: AdapterTrainer, batches: Sequence[Mapping[str, Any]]) -> Tensor:
    """Return how many there are in all micro-batches of a step, over all processes."""
    return trainer.summed(sum((real(batch).sum() for batch in batches), torch.zeros((), dtype=torch.long)))
