"""The decoder layers of a model of transformers, and another way to run them in training."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

ATTENTION_KERNELS = tuple(
    getattr(torch.ops.aten, name).default
    for name in (
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_cudnn_attention",
    )
)
"""torch's fused kernels, whose backward pass starts from their output."""


def decoder_layers(model: nn.Module) -> list[GradientCheckpointingLayer]:
    """Return the layers, first to last."""
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


@contextmanager
def run_by(layers: Sequence[GradientCheckpointingLayer], functions: Sequence[Callable[..., Any]]) -> Iterator[None]:
    """Put a function in the place of transformers' checkpointing of each layer, in training mode.

    Args:
        layers: as they are again after the block.
        functions: called with a layer's own forward, its keyword arguments bound, and the other arguments.
    """
    names = ("gradient_checkpointing", "_gradient_checkpointing_func")
    before = [{name: getattr(layer, name, None) for name in names} for layer in layers]
    for layer, function in zip(layers, functions, strict=True):
        vars(layer).update(zip(names, (True, function), strict=True))
    try:
        yield
    finally:
        for layer, own in zip(layers, before, strict=True):
            vars(layer).update(own)
