"""Write an adapter as a plain LoRA, where it is one exactly, for everything that reads LoRA."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, PeftType, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import nn

from toolkit.adapters.methods._base import AdapterLayer, LowRank
from toolkit.adapters.mhr import Task, mixed, poly_layers
from toolkit.checkpoints.adapters import WEIGHTS
from toolkit.checkpoints.writer import staged
from toolkit.errors import UnsupportedError


def fold(
    model: PeftModel,
    out: str | Path,
    *,
    adapter: str = "default",
    task: Task | None = None,
    overwrite: bool = False,
) -> Path:
    """Write an adapter that is attached to a model as a LoRA folder of PEFT's, float32.

    Args:
        model: with the adapter; only read.
        out: folder to write.
        adapter: its name.
        task: of a POLY adapter: the task that the LoRA is for; `unknown` is the average of its skills, from which
            MHR-mu goes on.
        overwrite: replace `out` if it exists.

    Raises:
        UnsupportedError: the adapter is no pair of factors; it may still merge into the weights.
        ValueError: a POLY adapter without a task, or another one with.
        OutputError: `out` exists.
    """
    pairs = _pairs(model, adapter, task)
    folder = Path(out)
    with staged(folder, overwrite=overwrite) as partial:
        tensors = dict(_whole(model, adapter))
        for name, pair in pairs.items():
            tensors[f"base_model.model.{name}.lora_A.weight"] = pair.a
            tensors[f"base_model.model.{name}.lora_B.weight"] = pair.b
        tensors = {name: value.detach().float().cpu().contiguous() for name, value in tensors.items()}
        save_file(tensors, partial / WEIGHTS, metadata={"format": "pt"})
        _config(model, adapter, pairs).save_pretrained(str(partial))
    return folder


def _pairs(model: PeftModel, adapter: str, task: Task | None) -> dict[str, LowRank]:
    kind = _kind(model, adapter)
    if kind == "POLY":
        if task is None:
            raise ValueError("a POLY adapter is one LoRA for each task: name one, or 'unknown' for their average")
        return {name: mixed(layer, task, adapter) for name, layer in poly_layers(model, adapter).items()}
    if task is not None:
        raise ValueError(f"a task is for POLY adapters; this one is {kind}")
    pairs = low_rank_pairs(model.get_base_model(), adapter)
    if not pairs:
        raise UnsupportedError(f"{kind} is no method of the toolkit; `toolkit adapters convert` takes what merges")
    return pairs


def low_rank_pairs(model: nn.Module, adapter: str = "default") -> dict[str, LowRank]:
    """Return an adapter of one of the toolkit's methods as factors, by the names of the linears.

    Args:
        model: with the adapter's layers in it.
        adapter: its name.

    Returns:
        No pairs where no layer is the toolkit's.

    Raises:
        UnsupportedError: the adapter is no pair of factors.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, AdapterLayer)}
    return {name: layer.low_rank(adapter) for name, layer in layers.items() if adapter in layer.configs}


def _kind(model: PeftModel, adapter: str) -> str:
    return PeftType(model.peft_config[adapter].peft_type).value


def _whole(model: PeftModel, adapter: str) -> Mapping[str, torch.Tensor]:
    """Return what an adapter stores besides its own tensors, which are named after its method."""
    prefix = f".{_kind(model, adapter).lower()}_"
    stored = get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False)
    return {name: value for name, value in stored.items() if prefix not in name}


def _config(model: PeftModel, adapter: str, pairs: Mapping[str, LowRank]) -> LoraConfig:
    """Return a configuration under which PEFT scales every pair as it should; most common values once."""
    own = model.peft_config[adapter]
    ranks = {name: len(pair.a) for name, pair in pairs.items()}
    alphas = {name: pair.scale * len(pair.a) for name, pair in pairs.items()}
    rank, alpha = Counter(ranks.values()).most_common(1)[0][0], Counter(alphas.values()).most_common(1)[0][0]
    return LoraConfig(
        r=rank,
        lora_alpha=alpha,  # pyright: ignore[reportArgumentType]  # PEFT computes with floats as well
        rank_pattern={name: value for name, value in ranks.items() if value != rank},
        alpha_pattern={name: value for name, value in alphas.items() if value != alpha},  # pyright: ignore[reportArgumentType]
        target_modules=sorted(pairs),
        modules_to_save=getattr(own, "modules_to_save", None),
        task_type=own.task_type,
        base_model_name_or_path=own.base_model_name_or_path,
        inference_mode=True,
    )
