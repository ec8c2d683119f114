"""What a run changes in a model, written so that it comes back to the same bits; and an adapter as PEFT stores it."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import save_file
from torch import Tensor

_NOTES = ("ipt", "exp_avg_ipt", "exp_avg_unc", "exp_avg_ipt_A", "exp_avg_ipt_B", "exp_avg_unc_A", "exp_avg_unc_B")
"""What PEFT's methods that drop ranks remember between steps (AdaLoRA's allocator, the layers of AdaMSS)."""


def save_adapter(model: PeftModel, folder: Path) -> None:
    """Write an adapter as PEFT does."""
    with warnings.catch_warnings():
        # AdaLoRA may leave a module no rank at all; PEFT takes that for a shard.
        warnings.filterwarnings("ignore", message=".*LoRA tensor.s. have invalid shape")
        # Copies of embeddings that a LoRA targets are of no use: training never resizes them.
        model.save_pretrained(str(folder), save_embedding_layers=False)
    if model.peft_config["default"].peft_type == "XLORA":
        # PEFT 0.21 leaves out the classifier: by the numbers in their names it takes its layers for those of a LoRA.
        mark = ".internal_xlora_classifier."
        tensors = {name: value.contiguous().cpu() for name, value in model.state_dict().items() if mark in name}
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def trained_state(model: PeftModel) -> dict[str, Any]:
    """Return what training changes: parameters, which of them are still trained, and notes of the method."""
    adapter = set(_adapter_parameters(model))
    values = {name: p for name, p in model.named_parameters() if p.requires_grad or name in adapter}
    return {
        "parameters": {name: p.detach().cpu() for name, p in values.items()},
        "frozen": [name for name, p in values.items() if not p.requires_grad],
        "rank_pattern": getattr(model.peft_config["default"], "rank_pattern", None),
        "notes": {key: vars(owner)[note] for key, owner, note in _notes(model)},
    }


def load_trained_state(model: PeftModel, path: Path) -> None:
    """Put back what `trained_state` returned."""
    state = torch.load(path, map_location="cpu", weights_only=True)
    own = dict(model.named_parameters())
    with torch.no_grad():
        for name, value in state["parameters"].items():
            own[name].copy_(value)
            own[name].requires_grad_(name not in state["frozen"])
    if state["rank_pattern"] is not None:
        model.peft_config["default"].rank_pattern = state["rank_pattern"]  # pyright: ignore[reportAttributeAccessIssue]
    for key, owner, note in _notes(model):
        if key in state["notes"]:
            vars(owner)[note] = _on(state["notes"][key], next(model.parameters()).device)


def _adapter_parameters(model: PeftModel) -> Iterator[str]:
    """Name the parameters that belong to the adapter, among them those that a method has stopped to train."""
    prefix = getattr(model.base_model, "prefix", None)
    if isinstance(prefix, str):
        yield from (name for name, _ in model.named_parameters() if prefix in name)


def _notes(model: PeftModel) -> Iterator[tuple[str, Any, str]]:
    """Yield every note of a method: its key in a checkpoint, what holds it, and under which name."""
    owners = [("allocator", getattr(model.base_model, "rankallocator", None)), *model.named_modules()]
    for name, owner in owners:
        for note in _NOTES:
            if owner is not None and note in vars(owner):
                yield f"{name}.{note}", owner, note


def _on(value: Any, device: torch.device) -> Any:
    """Move the tensors in dicts and lists to a device."""
    if isinstance(value, dict):
        return {key: _on(inner, device) for key, inner in value.items()}
    if isinstance(value, list):
        return [_on(inner, device) for inner in value]
    return value.to(device) if isinstance(value, Tensor) else value
