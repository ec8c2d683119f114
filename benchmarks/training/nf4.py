"""A base whose linear layers are in NormalFloats of four bits (2305.14314), computed on the CPU without bitsandbytes.

It is QLoRA's base but for its double quantisation: weights are in codes of four bits and a scale of 16 bits for every
64 of them, and are made anew, one layer at a time, in the forward and in the backward pass.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from toolkit.adapters.methods._normal_float import dequantize, quantize

BITS, BLOCK = 4, 64


class _Product(torch.autograd.Function):
    """`x W^T`, with W made of its codes in both passes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Nf4Linear) -> Tensor:
        """Return `[..., out]`."""
        ctx.layer = layer
        return x @ layer.weight.T

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Return the gradient of `x`; the weight is frozen."""
        return gradient @ ctx.layer.weight, None


class Nf4Linear(nn.Linear):
    """A frozen linear in four bits.

    Args:
        linear: of which it is made; without a bias.
    """

    def __init__(self, linear: nn.Linear) -> None:
        nn.Module.__init__(self)
        assert linear.bias is None
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.bias: Any = None
        codes, scales = quantize(linear.weight.detach(), BITS, BLOCK)
        self.register_buffer("codes", codes)
        self.register_buffer("scales", scales)

    @property
    def weight(self) -> Tensor:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The weight that the codes stand for, `[out, in]` float32."""
        codes, scales = self.get_buffer("codes"), self.get_buffer("scales")
        return dequantize(codes, scales, (self.out_features, self.in_features), BITS, BLOCK)

    def forward(self, x: Tensor) -> Tensor:
        """Return `[..., out]`."""
        return _Product.apply(x, self)  # pyright: ignore[reportReturnType]


def in_four_bits(model: Any) -> Any:
    """Replace the linear layers of a model, its head apart; return it."""
    head = model.get_output_embeddings()
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear and child is not head:
                setattr(module, name, Nf4Linear(child))
    return model
