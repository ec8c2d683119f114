"""Training and evaluation mode of a model's modules: changed for a while, and given back as they were."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn


@contextmanager
def modes_kept(model: nn.Module) -> Iterator[None]:
    """Put every module back into its own mode at the end of the block; they need not all have the same."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Hold a model in evaluation mode inside the block."""
    with modes_kept(model):
        model.eval()
        yield
