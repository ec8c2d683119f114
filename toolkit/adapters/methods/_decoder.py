"""Layers around a whole decoder: all between the input embeddings and the output head."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from toolkit.adapters.methods._base import AdapterConfig, AdapterLayer, Site
from toolkit.adapters.taps import decoder_layers, tapped


@dataclass
class DecoderConfig(AdapterConfig):
    """Fields of all methods that sit around the decoder.

    Attributes:
        target_modules: `decoder`: the model without its head, by whatever name.
    """

    target_modules: list[str] | str | None = "decoder"

    def resolve(self, model: nn.Module) -> None:
        """Write the name of the decoder instead of `decoder`."""
        if self.target_modules == "decoder":
            self.target_modules = [getattr(model, "base_model_prefix", "") or "model"]


class DecoderLayer(AdapterLayer):
    """A decoder with adapters around it; its own attributes are found here too."""

    TAKES: ClassVar[Literal["linear", "any", "decoder"]] = "decoder"

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer":
                raise
            return getattr(self.base_layer, name)

    @property
    def layers(self) -> nn.ModuleList:
        """Layers of the decoder."""
        return decoder_layers(self.get_base_layer())

    def running(self) -> list[str]:
        """Return the adapters that take part in a forward pass."""
        return [] if self.disable_adapters else [name for name in self.active_adapters if name in self.configs]

    def folds(self, adapter: str) -> bool:
        """Tell that it is no change of weights."""
        return False

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the decoder with its active adapters."""
        names = self.running()
        return self.run(names, args, kwargs) if names else self.base_layer(*args, **kwargs)

    def run(self, adapters: list[str], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the decoder with some adapters; return its output with other last hidden states."""
        raise NotImplementedError


class SideLayer(DecoderLayer):
    """A decoder with networks beside it, whose outputs are added to the last hidden states.

    A network is called with what was tapped, and returns `[B, T, H]`.
    """

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__(base_layer)
        setattr(self, f"{self.method}_network", nn.ModuleDict())
        self.adapter_layer_names = (f"{self.method}_network",)
        self.other_param_names = ("configs",)

    @property
    def networks(self) -> Mapping[str, nn.Module]:
        """The networks by adapter."""
        return getattr(self, f"{self.method}_network")

    def make(self, config: Any, site: Site) -> nn.Module:
        """Return the network of a new adapter, float32.

        Raises:
            ValueError: the configuration does not fit the decoder.
        """
        raise NotImplementedError

    def add(self, adapter: str, config: Any, site: Site) -> None:
        """Put a new network beside the decoder."""
        getattr(self, f"{self.method}_network")[adapter] = self.make(config, site)
        self.configs[adapter] = config
        self._move_adapter_to_device_of_base_layer(adapter)
        self.set_adapter(self.active_adapters)

    def run(self, adapters: list[str], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the decoder without a graph, and add what the networks make of its states."""
        with tapped(self.layers) as seen, torch.no_grad():
            output = self.base_layer(*args, **kwargs)
        total = last_states(output)
        for name in adapters:
            total = total + self.networks[name](seen)
        return with_last_states(output, total.to(last_states(output).dtype))


def last_states(output: Any) -> Tensor:
    """Return the last hidden states of a decoder's output, `[B, T, H]`."""
    return output[0]


def with_last_states(output: Any, value: Tensor) -> Any:
    """Return a decoder's output with other last hidden states."""
    if isinstance(output, tuple):
        return (value, *output[1:])
    output.last_hidden_state = value
    return output


def chosen_layers(layers: list[int] | None, count: int) -> list[int]:
    """Return numbers of layers from 0, all by default.

    Raises:
        ValueError: there is no such layer, or none is named.
    """
    numbers = (
        list(range(count)) if layers is None else sorted({n % count if -count <= n < count else n for n in layers})
    )
    if not numbers or numbers[-1] >= count or numbers[0] < 0:
        raise ValueError(f"layers {layers}: the decoder has the layers 0 to {count - 1}")
    return numbers
