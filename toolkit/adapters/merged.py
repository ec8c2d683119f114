"""A model with an adapter of any method merged into its weights, leaving the model itself alone."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn

from toolkit.errors import UnsupportedError


def merged_parameters(model: nn.Module, folder: str | Path) -> dict[str, torch.Tensor]:
    """Return the parameters of a model with an adapter merged into them, on the host.

    Args:
        model: the base, without adapters; it is copied.
        folder: a PEFT folder of any method that PEFT, or the toolkit, can merge.

    Raises:
        UnsupportedError: the method cannot be merged into weights.
    """
    # PEFT writes into the parameters that it merges, so they are copied too.
    memo: dict[int, Any] = {
        id(p): nn.Parameter(p.detach().to("cpu", copy=True), requires_grad=False) for p in model.parameters()
    }
    try:
        adapted = PeftModel.from_pretrained(copy.deepcopy(model, memo).to("cpu"), str(folder))
        merged: nn.Module = adapted.merge_and_unload(safe_merge=True)
    except Exception as error:  # whatever a method's own code raises
        reason = " ".join(str(error).split())[:200]
        raise UnsupportedError(f"{folder}: cannot be merged into weights ({reason})") from error
    return {name: p.detach() for name, p in merged.named_parameters(remove_duplicate=False)}
