"""A model with an adapter of any method on it, beside the model itself: modules of its own, and the model's weights."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from torch import nn
from transformers import PreTrainedModel

from toolkit.adapters.methods.vl_adapter import VlAdapterLayer
from toolkit.errors import UnsupportedError
from toolkit.models.load import quiet_transformers

_NOT_LAYERS = ("XLORA", "POLY")
"""Types that must see whole calls of the model, and not of its modules alone."""


def attached(model: PreTrainedModel, folder: str | Path, task: str | None = None) -> PreTrainedModel:
    """Return a model with an adapter's layers in it, which shares every weight with the model that was given.

    Args:
        model: the base, without adapters; it is left alone.
        folder: a PEFT folder whose adapter consists of layers inside the model.
        task: number of the one that every row is of, where the adapter has several.

    Raises:
        UnsupportedError: an adapter of another kind, one that does not fit the model, or no task, or a wrong one.
    """
    kind = _check_kind(folder)
    try:
        with quiet_transformers():
            adapted = PeftModel.from_pretrained(beside(model), str(folder), torch_device=str(model.device)).eval()
    except Exception as error:  # whatever a method's own code raises
        reason = " ".join(str(error).split())[:200]
        raise UnsupportedError(f"{folder}: an adapter of type {kind} does not fit the model ({reason})") from error
    _set_task(adapted, str(folder), task)
    return adapted.get_base_model()  # pyright: ignore[reportReturnType]


def beside(model: PreTrainedModel) -> PreTrainedModel:
    """Return a model of modules of its own, which shares every weight with the model that was given."""
    shared: dict[int, Any] = {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in model.parameters()}
    shared |= {id(buffer): buffer for buffer in model.buffers()}
    return copy.deepcopy(model, shared)


def _check_kind(folder: str | Path) -> str:
    try:
        config: Any = PeftConfig.from_pretrained(str(folder))
    except Exception as error:  # an unknown type, or fields of a later version
        reason = " ".join(str(error).split())[:200]
        raise UnsupportedError(f"{folder}: {reason}") from error
    kind = str(config.peft_type.value)
    if config.is_prompt_learning or kind in _NOT_LAYERS:
        raise UnsupportedError(f"{folder}: an adapter of type {kind} is more than layers inside of the model")
    return kind


def _set_task(model: nn.Module, folder: str, task: str | None) -> None:
    """Give every row of all batches one task."""
    layers = [module for module in model.modules() if isinstance(module, VlAdapterLayer)]
    count = max((config.n_tasks for layer in layers for config in layer.configs.values()), default=1)
    if task is None and count > 1:
        raise UnsupportedError(f"{folder}: has {count} tasks; name one, such as {folder}#0")
    if task is None:
        return
    if not layers or not task.isdecimal() or int(task) >= count:
        raise UnsupportedError(f"{folder}: has no task {task!r}; its tasks are {', '.join(map(str, range(count)))}")
    for layer in layers:
        layer.tasks = torch.tensor([int(task)])
