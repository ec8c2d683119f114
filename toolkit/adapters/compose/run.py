"""Put a composition on a model, from YAML or from Python."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from pydantic import Field

from toolkit import specs
from toolkit.adapters.methods.composition import CompositionConfig
from toolkit.errors import Problem
from toolkit.models.load import load_model
from toolkit.specs import FolderOrObject, Spec


class ComposeSpec(Spec):
    """A composition in a file.

    Attributes:
        base: model that the adapters are for.
        sources: adapters by names.
        compose: the tree of them; by default their average.
    """

    base: FolderOrObject
    sources: dict[str, Any] = Field(min_length=1)
    compose: Any = None


def compose(spec: specs.Source | ComposeSpec, *, device: str = "cpu", dtype: torch.dtype | None = None) -> PeftModel:
    """Load a base with several adapters on it, put together as a tree says.

    Args:
        spec: a YAML file, a dict or a `ComposeSpec`.
        device: where to put the model.
        dtype: of the base.

    Returns:
        A model of PEFT's, in evaluation mode; `save_pretrained` writes the whole composition as one adapter folder.

    Raises:
        SpecError: the tree is wrong, or names adapters that are not among the sources.
        MissingError: no such base or adapter.
        UnsupportedError: an adapter that cannot be composed.
    """
    loaded = specs.load(spec, ComposeSpec)
    try:
        config = CompositionConfig(task_type="CAUSAL_LM", sources=dict(loaded.sources), compose=loaded.compose)
    except ValueError as error:
        raise loaded.error([*getattr(error, "problems", [Problem("compose", str(error))])]) from None
    model = load_model(loaded.base, device=device, dtype=dtype).model
    composed = get_peft_model(model, config, adapter_name="default")
    assert isinstance(composed, PeftModel)
    return composed.eval()


def replicate(batch: Mapping[str, torch.Tensor], count: int) -> dict[str, torch.Tensor]:
    """Return a batch `[B, ...]` as often as there are parallel adapters, `[count * B, ...]`."""
    return {name: value.repeat(count, *[1] * (value.ndim - 1)) for name, value in batch.items()}
