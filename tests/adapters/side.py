"""What the tests of networks beside a decoder share: taps of a tiny model, and what a forward pass keeps."""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel

from tests.adapters.laws import IDS
from toolkit.adapters.methods._decoder import DecoderLayer
from toolkit.adapters.taps import Taps, tapped


def decoder(model: torch.nn.Module) -> Any:
    """Return the decoder of a model, with its adapter where it has one."""
    inner: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    return getattr(inner, inner.base_model_prefix)


def network(model: PeftModel) -> Any:
    layer = decoder(model)
    assert isinstance(layer, DecoderLayer)
    return layer.networks["default"]


def taps(model: torch.nn.Module, ids: torch.Tensor = IDS) -> Taps:
    """Return what passes between the layers of a plain model."""
    found = decoder(model)
    with torch.no_grad(), tapped(found.layers) as seen:
        found(input_ids=ids, use_cache=False)
    return seen


def kept_bytes(model: torch.nn.Module, ids: torch.Tensor = IDS) -> int:
    """Return what a forward pass of the decoder keeps for the backward pass, besides parameters and buffers."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, torch.Tensor] = {}

    def keep(value: torch.Tensor) -> torch.Tensor:
        if value.untyped_storage().data_ptr() not in own:
            kept[value.untyped_storage().data_ptr()] = value
        return value

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
        output = decoder(model)(input_ids=ids, use_cache=False).last_hidden_state
    del output
    return sum(value.untyped_storage().nbytes() for value in kept.values())


def gradient_bytes(model: torch.nn.Module) -> int:
    """Return the bytes of the gradients of what is trained in the layers and beside them."""
    return sum(
        4 * v.numel() for n, v in model.named_parameters() if v.requires_grad and "embed" not in n and "head" not in n
    )
