"""Which logits a model computes."""

from __future__ import annotations

import inspect
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn


def keeps_logits(model: nn.Module) -> bool:
    """Tell whether a model can leave out logits that nobody asks for."""
    return _keeps_logits(type(model))


@cache
def _keeps_logits(kind: type[nn.Module]) -> bool:
    return "logits_to_keep" in inspect.signature(kind.forward).parameters
