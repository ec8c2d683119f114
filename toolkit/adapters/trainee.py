"""The model of a training run: loaded, with its adapter on, and given back as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from peft import PeftModel, get_peft_model

from toolkit.adapters.config import peft_config
from toolkit.adapters.spec import TrainSpec
from toolkit.errors import Problem
from toolkit.models.load import LoadedModel, init_model, load_model, pick_device
from toolkit.models.modes import modes_kept

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@contextmanager
def trainee(spec: TrainSpec) -> Iterator[LoadedModel]:
    """Yield the model that a spec trains; one that came as an object loses its adapter again at the end.

    Raises:
        SpecError: the adapter's configuration is wrong, or matches no module of the model.
    """
    torch.manual_seed(spec.training.seed)
    device = pick_device(spec.device)
    if spec.initialize == "random":
        loaded = init_model(spec.base, seed=spec.training.seed, device=device, trust_remote_code=spec.trust_remote_code)
    else:
        dtype = torch.bfloat16 if computes_bfloat16(spec) and spec.adapter.method != "full" else torch.float32
        loaded = load_model(spec.base, device=device, dtype=dtype, trust_remote_code=spec.trust_remote_code)
    with _restored(loaded.model):
        if spec.adapter.method == "full":
            yield loaded
            return
        adapted = _adapted(spec, loaded)
        try:
            yield LoadedModel(loaded.source, adapted, loaded.tokenizer)  # pyright: ignore[reportArgumentType]  # wraps it
        finally:
            adapted.unload()


def computes_bfloat16(spec: TrainSpec) -> bool:
    """Tell whether forward and backward passes compute in bfloat16."""
    if spec.training.precision != "auto":
        return spec.training.precision == "bfloat16"
    return pick_device(spec.device).type == "cuda" and torch.cuda.is_bf16_supported()


def _adapted(spec: TrainSpec, loaded: LoadedModel) -> PeftModel:
    config, found = peft_config(spec.adapter)
    if config is None:
        raise spec.error(found)
    try:
        adapted = get_peft_model(loaded.model, config)
    except (AttributeError, ImportError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise spec.error([Problem("adapter", f"PEFT refuses it: {' '.join(str(error).split())}")]) from error
    assert isinstance(adapted, PeftModel)
    return adapted


def save(spec: TrainSpec, loaded: LoadedModel, folder: Path) -> None:
    """Write the adapter of a trainee, or the whole model with its tokenizer."""
    model = loaded.model
    if isinstance(model, PeftModel):
        # PEFT would write what the model calls itself; the spec's own words find the base again.
        model.peft_config["default"].base_model_name_or_path = loaded.source
        # Copies of embeddings that a LoRA targets are of no use: training never resizes them.
        model.save_pretrained(str(folder), save_embedding_layers=False)
        return
    config, trained_as, use_cache = model.config, model.dtype, model.config.use_cache
    config.use_cache = True  # the trainer turned it off
    torch.nn.Module.to(model, getattr(torch, spec.save_dtype or "float32"))
    model.save_pretrained(folder)
    torch.nn.Module.to(model, trained_as)
    config.use_cache = use_cache
    loaded.tokenizer.save_pretrained(folder)


@contextmanager
def _restored(model: PreTrainedModel) -> Iterator[None]:
    """Put back what training changes besides weights: cache setting, frozen parameters, checkpointing, modes."""
    config = model.config
    had_cache, use_cache = hasattr(config, "use_cache"), getattr(config, "use_cache", None)
    frozen = {name: value.requires_grad for name, value in model.named_parameters()}
    recomputed = [(m, m.gradient_checkpointing) for m in model.modules() if hasattr(m, "gradient_checkpointing")]
    try:
        with modes_kept(model):
            yield
    finally:
        if had_cache:
            config.use_cache = use_cache
        for module, on in recomputed:
            module.gradient_checkpointing = on
        for name, value in model.named_parameters():
            value.requires_grad_(frozen.get(name, value.requires_grad))
