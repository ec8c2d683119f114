"""Load what is served, and put paged attention under it."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel

from toolkit.checkpoints.dtypes import by_torch_name
from toolkit.errors import UnsupportedError
from toolkit.models.load import LoadedModel, load_model, pick_device, quiet_transformers
from toolkit.serving.attention import NAME


def load(model: Any, device: str, dtype: str | None, trust_remote_code: bool) -> LoadedModel:
    """Load what is served; of a model that came as an object, check that it is as it is asked for."""
    form = by_torch_name(dtype) if dtype else None
    if form and not form.floating:
        raise UnsupportedError(f"dtype {dtype!r} is not one that a model can run in; use bfloat16, float16 or float32")
    wanted = getattr(torch, form.torch) if form else None
    place = pick_device(device)
    if isinstance(model, tuple | LoadedModel):
        loaded = load_model(model)
        own = loaded.model.device
        if device != "auto" and (place.type != own.type or place.index not in (None, own.index)):
            raise UnsupportedError(f"the model is on {own}, not on {device}; move it first, or leave device out")
        if wanted not in (None, loaded.model.dtype):
            raise UnsupportedError(
                f"the model is in {loaded.model.dtype}, not in {wanted}; convert it first, or leave dtype out"
            )
        return loaded
    return load_model(model, device=place, dtype=wanted, attention=NAME, trust_remote_code=trust_remote_code)


def set_attention(model: PreTrainedModel, name: str) -> None:
    """Change a model's attention; whether it could, the runner sees."""
    with quiet_transformers():
        try:
            model.set_attn_implementation(name)
        except ValueError as error:
            raise UnsupportedError(f"{type(model).__name__} cannot take another attention ({error})") from None
