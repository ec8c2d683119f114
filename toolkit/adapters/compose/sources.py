"""Adapters as layers that are not in a model: made by PEFT on it, and taken off again.

A composition holds the layers of its sources, with their tensors, so that one folder is all that is needed to load it.
"""

from __future__ import annotations

import dataclasses
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PeftConfig, PeftModel, PeftType, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file
from torch import Tensor, nn

from toolkit.checkpoints.adapters import CONFIG, WEIGHTS
from toolkit.checkpoints.locate import locate
from toolkit.errors import CheckpointError, MissingError, UnsupportedError
from toolkit.models.load import quiet_transformers

Layers = dict[str, BaseTunerLayer]
"""The layers of an adapter by the names of the modules that they are for."""

_NOT_LAYERS = ("ADAPTION_PROMPT", "POLY", "SHADOW", "TRAINABLE_TOKENS", "XLORA")
"""Types that are more than layers around modules, or whose layers must be told something of every row."""

_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga", "eva")


def read_source(source: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read an adapter's configuration, as far as it differs from its defaults, and its tensors.

    Raises:
        MissingError: no adapter there.
        CheckpointError: no safetensors.
    """
    folder = locate(str(source))
    if not (folder / CONFIG).is_file():
        raise MissingError(f"{source}: no {CONFIG} in this folder")
    if not (folder / WEIGHTS).is_file():
        raise CheckpointError(f"{source}: no {WEIGHTS} in this folder")
    return plain(PeftConfig.from_pretrained(str(folder))), load_file(folder / WEIGHTS)


def plain(config: PeftConfig) -> dict[str, Any]:
    """Return the fields of a configuration that differ from their defaults, as JSON holds them."""
    found: dict[str, Any] = {"peft_type": PeftType(config.peft_type).value}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        if field.name in ("base_model_name_or_path", "peft_version", "inference_mode", *found):
            continue
        if value != default:
            found[field.name] = sorted(value) if isinstance(value, set) else value
    return found


def config_of(fields: Mapping[str, Any]) -> PeftConfig:
    """Return the configuration that `plain` wrote down.

    Raises:
        UnsupportedError: a type that PEFT does not know, or that cannot be composed.
    """
    kind = str(fields.get("peft_type", ""))
    if kind not in PeftType.__members__:
        raise UnsupportedError(f"expected an adapter with a peft_type that PEFT knows, got {kind!r}")
    values = {key: value for key, value in fields.items() if key != "peft_type"}
    config: Any = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(kind)](**values)
    if config.is_prompt_learning or kind in _NOT_LAYERS or getattr(config, "n_tasks", 1) > 1:
        what = "; fold it for one task first" if kind == "POLY" else ""
        raise UnsupportedError(f"{kind} adapters are more than layers around modules and cannot be composed{what}")
    used = [key for key in ("modules_to_save", "trainable_token_indices", "layer_replication") if values.get(key)]
    if values.get("bias", "none") != "none":
        used.append("bias")
    if used:
        raise UnsupportedError(f"the adapter uses {', '.join(used)}, which cannot be composed")
    if str(values.get("init_lora_weights")).startswith(_CHANGES_BASE):
        raise UnsupportedError(f"init_lora_weights={values['init_lora_weights']!r} changed the base it was trained on")
    return config


def layers_of(name: str, fields: Mapping[str, Any], tensors: Mapping[str, Tensor] | None, model: nn.Module) -> Layers:
    """Make the layers of an adapter for a model, which is given back as it was.

    Args:
        name: of the adapter.
        fields: its configuration.
        tensors: its own; they start as a new adapter's where they will be read later.
        model: without adapters.

    Raises:
        UnsupportedError: an adapter that cannot be composed.
        CheckpointError: tensors that are not those of the configuration.
    """
    config = config_of(fields)
    with _bare(model), quiet_transformers(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to")  # PEFT mends it
        adapted = PeftModel(model, config, adapter_name=name)  # pyright: ignore[reportArgumentType]
        layers: Layers = {}
        try:
            if tensors is not None:
                _load(adapted, name, tensors)
        finally:
            layers = _taken_off(model)
    if not layers or any(getattr(layer, "TAKES", "") == "decoder" for layer in layers.values()):
        raise UnsupportedError(f"{name}: {fields['peft_type']} adapters do not sit around single modules of this model")
    for layer in layers.values():
        layer.requires_grad_(False)  # pyright: ignore[reportAttributeAccessIssue]  # a module as well
    return layers


def _load(adapted: PeftModel, name: str, tensors: Mapping[str, Tensor]) -> None:
    try:
        result = set_peft_model_state_dict(adapted, dict(tensors), adapter_name=name)
    except RuntimeError as error:
        raise CheckpointError(f"{name}: {' '.join(str(error).split())[:300]}") from None
    if result.unexpected_keys:
        raise CheckpointError(
            f"{name}: {result.unexpected_keys[0]} fits no module of this model; is it of another base?"
        )


def _taken_off(model: nn.Module) -> Layers:
    """Put the modules of a model back in the place of the layers around them, and return those."""
    found: Layers = {}
    for key, module in list(model.named_modules()):
        if isinstance(module, BaseTunerLayer) and not any(key.startswith(f"{outer}.") for outer in found):
            found[key] = module
    for key, layer in found.items():
        base: Any = layer.get_base_layer()
        put(model, key, base)
        vars(layer)["_modules"].pop("base_layer", None)  # what is below is no part of the source
    return found


def put(model: nn.Module, key: str, module: nn.Module) -> None:
    """Set a module of a model by its name."""
    parent, _, last = key.rpartition(".")
    setattr(model.get_submodule(parent), last, module)


@contextmanager
def _bare(model: Any) -> Iterator[None]:
    """Take compositions off a model, and what PEFT notes on it, inside the block."""
    from toolkit.adapters.compose.layer import ComposedLayer

    noted = vars(model).pop("peft_config", None)
    trained = {name: value.requires_grad for name, value in model.named_parameters()}
    composed = [(key, module) for key, module in model.named_modules() if isinstance(module, ComposedLayer)]
    for key, layer in reversed(composed):
        put(model, key, layer.get_base_layer())
    try:
        yield
    finally:
        for key, layer in composed:
            put(model, re.sub(r"\.base_layer(?=\.)", "", key), layer)
        vars(model).pop("peft_config", None)
        if noted is not None:
            vars(model)["peft_config"] = noted
        for name, value in model.named_parameters():
            value.requires_grad_(trained.get(name, value.requires_grad))
