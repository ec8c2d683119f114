"""The model of a training run: loaded, with its adapter on, and given back as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from peft import PeftModel, get_peft_model

from toolkit.adapters.catalogue import FULL
from toolkit.adapters.config import peft_config
from toolkit.adapters.methods.vl_adapter import takes_task_ids
from toolkit.adapters.parts import Parts, parts_of
from toolkit.adapters.processes import own_device
from toolkit.adapters.quantized import load_quantized
from toolkit.adapters.spec import TrainSpec
from toolkit.adapters.state import save_adapter
from toolkit.checkpoints.layout import Layout, layer_of
from toolkit.errors import Problem
from toolkit.models.load import LoadedModel, init_model, load_model, pick_device
from toolkit.models.modes import modes_kept

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@contextmanager
def trainee(spec: TrainSpec, parts: Parts | None = None) -> Iterator[LoadedModel]:
    """Yield the model that a spec trains; one that came as an object loses its adapter again at the end.

    Args:
        spec: of the run.
        parts: its objective and methods.

    Raises:
        SpecError: the adapter's configuration is wrong, or matches no module of the model.
    """
    torch.manual_seed(spec.training.seed)
    base = _loaded(spec)
    objective = (parts or parts_of(spec)).objective
    with _restored(base.model), objective.model(base) as loaded:
        if spec.adapter.method == FULL:
            _freeze_other_layers(spec, loaded)
            yield loaded
            return
        adapted = _adapted(spec, loaded, objective.task_type)
        try:
            yield LoadedModel(loaded.source, adapted, loaded.tokenizer)  # pyright: ignore[reportArgumentType]  # wraps it
        finally:
            _take_off(adapted)


def _loaded(spec: TrainSpec) -> LoadedModel:
    device = own_device(pick_device(spec.device))
    if spec.training.fsdp or spec.training.deepspeed:
        device = torch.device("cpu")  # they put each process's part of it where it belongs
    options = {"device": device, "trust_remote_code": spec.trust_remote_code}
    if spec.initialize == "random":
        return init_model(spec.base, seed=spec.training.seed, **options)
    if spec.quantization:
        return load_quantized(spec.base, spec.quantization, **options)
    dtype = torch.bfloat16 if computes_bfloat16(spec) and spec.adapter.method != FULL else torch.float32
    return load_model(spec.base, dtype=dtype, **options)


def computes_bfloat16(spec: TrainSpec) -> bool:
    """Tell whether forward and backward passes compute in bfloat16."""
    if spec.training.precision != "auto":
        return spec.training.precision == "bfloat16"
    return pick_device(spec.device).type == "cuda" and torch.cuda.is_bf16_supported()


def _adapted(spec: TrainSpec, loaded: LoadedModel, task_type: str) -> PeftModel:
    config, found = peft_config(spec.adapter, task_type)
    if config is None:
        raise spec.error(found)
    if spec.adapter.layers is not None:
        config.layers_to_transform = _layers(spec, loaded)  # pyright: ignore[reportAttributeAccessIssue]  # checked
    if "hidden_size" in vars(config) and "hidden_size" not in spec.adapter.fields:
        config.hidden_size = loaded.model.config.get_text_config().hidden_size  # pyright: ignore[reportAttributeAccessIssue]
    loaded.model.config.use_cache = False  # X-LoRA wants it so; the trainer turns it off for all
    try:
        adapted = get_peft_model(loaded.model, config)
    except (AttributeError, ImportError, LookupError, OSError, RuntimeError, TypeError, ValueError) as error:
        raise spec.error([Problem("adapter", f"PEFT refuses it: {' '.join(str(error).split())}")]) from error
    assert isinstance(adapted, PeftModel)
    takes_task_ids(adapted)
    if not any(value.requires_grad for value in adapted.parameters()):
        message = f"{spec.adapter.method} found nothing to train here; its target_modules are no layers that it knows"
        raise spec.error([Problem("adapter", message)])
    return adapted


def _layers(spec: TrainSpec, loaded: LoadedModel) -> list[int]:
    """Return the numbers of a spec's layers from 0, checked against the model."""
    count = max(Layout(name for name, _ in loaded.model.named_parameters()).num_layers.values(), default=0)
    wrong = [layer for layer in spec.adapter.layers or () if not -count <= layer < count]
    if wrong:
        raise spec.error([Problem("adapter.layers", f"no layer {wrong[0]}; the model has {count}")])
    return sorted({layer % count for layer in spec.adapter.layers or ()})


def _freeze_other_layers(spec: TrainSpec, loaded: LoadedModel) -> None:
    """Leave only the spec's layers to be trained, if it names some."""
    if spec.adapter.layers is None:
        return
    chosen = _layers(spec, loaded)
    for name, value in loaded.model.named_parameters():
        place = layer_of(name)
        value.requires_grad_(place is not None and place[1] in chosen)


def _take_off(adapted: PeftModel) -> None:
    """Give the base back without the adapter; methods that are not made of layers around its own know other ways."""
    for name in ("unload", "disable_adapter_layers"):
        if hasattr(adapted.base_model, name):
            getattr(adapted.base_model, name)()
            return


def name_base(loaded: LoadedModel) -> None:
    """Have the adapter name its base in the spec's own words, instead of by what the model calls itself."""
    if isinstance(loaded.model, PeftModel):
        loaded.model.peft_config["default"].base_model_name_or_path = loaded.source


def save(spec: TrainSpec, loaded: LoadedModel, folder: Path) -> None:
    """Write the adapter of a trainee, or the whole model with its tokenizer."""
    model = loaded.model
    if isinstance(model, PeftModel):
        name_base(loaded)
        save_adapter(model, folder)
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
    own_forward = "forward" in vars(model)
    recomputed = [(m, m.gradient_checkpointing) for m in model.modules() if hasattr(m, "gradient_checkpointing")]
    try:
        with modes_kept(model):
            yield
    finally:
        if not own_forward:
            vars(model).pop("forward", None)  # accelerate's, for mixed precision
        if had_cache:
            config.use_cache = use_cache
        for module, on in recomputed:
            module.gradient_checkpointing = on
        for name, value in model.named_parameters():
            value.requires_grad_(frozen.get(name, value.requires_grad))
