"""What a method file starts from: a configuration, the layer to fill in, and `register`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, ClassVar

from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import register_peft_method
from torch import nn
from transformers.pytorch_utils import Conv1D

from toolkit.adapters.methods._layer import AdapterLayer, LowRank, WeightChange, linear_sizes, uniform
from toolkit.adapters.methods._sites import Site, Sites
from toolkit.adapters.registration import add_peft_type
from toolkit.errors import UnsupportedError

__all__ = [
    "AdapterConfig",
    "AdapterLayer",
    "LowRank",
    "Site",
    "WeightChange",
    "linear_sizes",
    "register",
    "uniform",
]


@dataclass
class AdapterConfig(PeftConfig):
    """Fields of every method.

    Attributes:
        target_modules: modules to adapt: ends of their names, or a regular expression, or `all-linear`.
        exclude_modules: modules to leave out, named likewise.
        layers_to_transform: numbers of the layers to adapt; all by default.
        layers_pattern: name of the list of layers, where `layers_to_transform` needs it.
        modules_to_save: other modules that are trained and stored whole.
    """

    method: ClassVar[str]

    target_modules: list[str] | str | None = "all-linear"
    exclude_modules: list[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    modules_to_save: list[str] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = add_peft_type(self.method)
        if not 0 <= getattr(self, "dropout", 0) < 1:
            raise ValueError("dropout is at least 0 and below 1")

    def resolve(self, model: nn.Module) -> None:
        """Fill in what depends on the model, before its first module is adapted."""


class Tuner(BaseTuner):
    """Puts a method's layers into a model; `register` makes one of these for each method."""

    sites: Sites

    def _prepare_model(self, peft_config: Any, model: nn.Module) -> None:
        """Look at all modules before the first is adapted."""
        peft_config.resolve(model)
        self.sites = Sites(self, peft_config, model)

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: Any,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        kind: Any = self.tuner_layer_cls
        module = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        if kind.TAKES == "linear" and not isinstance(module, nn.Linear | Conv1D):
            raise TypeError(f"{current_key}: {kind.method} adapts linear layers, not {type(module).__name__}")
        layer: Any = target if isinstance(target, kind) else kind(target)
        try:
            layer.add(adapter_name, peft_config, self.sites.take(current_key, layer))
        except ValueError as error:
            raise ValueError(f"{current_key}: {error}") from None
        if layer is not target:
            layer.set_adapter(self.active_adapters)
            # A sublayer may be adapted as well as what is in it.
            setattr(parent.get_base_layer() if isinstance(parent, AdapterLayer) else parent, target_name, layer)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        if isinstance(child, AdapterLayer):
            child.leave()
        setattr(parent, child_name, new_module)

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        """Return what a checkpoint calls a tensor: without the adapter's name after that of the method's own part.

        PEFT looks for the name at the end alone, where it is not once a part is a module of modules.
        """
        return re.sub(rf"(\.{re.escape(cls.prefix)}[^.]*)\.{re.escape(adapter_name)}(?=\.|$)", r"\1", key, count=1)

    def _check_merge_allowed(self) -> None:
        super()._check_merge_allowed()
        for key, layer in self.model.named_modules():
            if isinstance(layer, AdapterLayer) and not all(layer.folds(name) for name in layer.configs):
                raise UnsupportedError(
                    f"{key}: {layer.method} adapters are more than a change of weights here and cannot be merged"
                )


def register(name: str, config: type[AdapterConfig], layer: type[AdapterLayer]) -> None:
    """Make PEFT know a method.

    Args:
        name: what a spec and `adapter_config.json` (in capitals) call it; parameters are `{name}_...`.
        config: dataclass of its fields.
        layer: what is put around a module.

    Raises:
        KeyError: PEFT has a method of that name.
    """
    config.method = layer.method = name
    add_peft_type(name)
    words = {"prefix": f"{name}_", "tuner_layer_cls": layer, "target_module_mapping": {}}
    words |= {"__module__": layer.__module__, "__doc__": layer.__doc__}
    tuner = type(layer.__name__.removesuffix("Linear").removesuffix("Layer") + "Model", (Tuner,), words)
    register_peft_method(name=name, config_cls=config, model_cls=tuner, prefix=f"{name}_")
