"""What adapters do to a module besides adding a low-rank product: each says what the module would give with it."""

from __future__ import annotations

import copy
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from typing import Protocol
from weakref import WeakValueDictionary

import torch
from torch import nn
from torch.utils.weak import WeakTensorKeyDictionary

from toolkit.kernels.delta_linear import BitDeltas, delta_linear


class Change(Protocol):
    """A change of one module, linear in what it changes, so that changes can be weighted and added up."""

    @property
    def nbytes(self) -> int:
        """Bytes that it takes on the device."""
        ...

    def to(self, device: torch.device) -> Change:
        """Return it on a device."""
        ...

    def outputs(self, module: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Return what the changed module gives for `x`, where it gives `y` unchanged."""
        ...


def with_parameters(module: nn.Module, parameters: Mapping[str, torch.Tensor]) -> nn.Module:
    """Return the module with other parameters; unlike `functional_call`, it leaves the module itself alone."""
    other = copy.copy(module)
    other._parameters = {**module._parameters, **parameters}  # pyright: ignore[reportAttributeAccessIssue]
    return other


@dataclass(frozen=True)
class Replaced:
    """Parameters of another fine-tune, kept whole.

    Attributes:
        parameters: by their names in the module.
    """

    parameters: Mapping[str, torch.Tensor]

    @property
    def nbytes(self) -> int:
        """See `Change`."""
        return sum(t.nbytes for t in self.parameters.values())

    def to(self, device: torch.device) -> Replaced:
        """See `Change`."""
        return Replaced({name: value.to(device) for name, value in self.parameters.items()})

    def outputs(self, module: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """See `Change`."""
        return with_parameters(module, self.parameters)(x)


class Recipe(Protocol):
    """How a parameter is made from the base's and from what is kept of a fine-tune."""

    @property
    def parts(self) -> Mapping[str, torch.Tensor]:
        """What is kept."""
        ...

    def to(self, device: torch.device) -> Recipe:
        """Return it on a device."""
        ...

    def make(self, base: torch.Tensor) -> torch.Tensor:
        """Return the parameter."""
        ...


@dataclass(frozen=True)
class Rebuilt:
    """Parameters that are rebuilt from a compressed delta each time they are needed.

    Attributes:
        recipes: by the parameters' names in the module.
    """

    recipes: Mapping[str, Recipe]

    @property
    def nbytes(self) -> int:
        """See `Change`."""
        return sum(t.nbytes for recipe in self.recipes.values() for t in recipe.parts.values())

    def to(self, device: torch.device) -> Rebuilt:
        """See `Change`."""
        return Rebuilt({name: recipe.to(device) for name, recipe in self.recipes.items()})

    def outputs(self, module: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """See `Change`."""
        own = dict(module.named_parameters())
        return with_parameters(module, {name: recipe.make(own[name]) for name, recipe in self.recipes.items()})(x)


@dataclass(frozen=True)
class BitChange:
    """The weight of a linear changed by one bit per element, which is added without rebuilding the weight.

    Attributes:
        deltas: of this fine-tune alone; its vector, if it has one, may be that of others too.
    """

    deltas: BitDeltas

    @property
    def nbytes(self) -> int:
        """See `Change`."""
        return self.deltas.nbytes

    def to(self, device: torch.device) -> BitChange:
        """See `Change`; what several fine-tunes share is on the device once."""
        own, vector = self.deltas, self.deltas.vector_NK
        moved = None if vector is None else _once_on(device, vector)
        return BitChange(BitDeltas(own.bits_SNB.to(device), own.scale_SN.to(device), moved))

    def outputs(self, module: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """See `Change`."""
        out = y.clone()
        rows, features = out.view(-1, out.shape[-1]), x.reshape(-1, x.shape[-1])
        delta_linear(rows, features, (0,) * len(rows), self.deltas)
        return out


_COPIES: MutableMapping[torch.Tensor, WeakValueDictionary[torch.device, torch.Tensor]] = WeakTensorKeyDictionary()
"""Tensors of the host -> their copies on devices, as long as somebody uses them."""


def _once_on(device: torch.device, tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor on a device, the same one as last time while that is still used."""
    if tensor.device == device:
        return tensor
    copies = _COPIES.setdefault(tensor, WeakValueDictionary())
    found = copies.get(device)
    if found is None:
        copies[device] = found = tensor.to(device)
    return found


@dataclass(frozen=True)
class Scaled:
    """A factor per feature of a linear's outputs, or of its inputs (Liu et al., "Few-Shot Parameter-Efficient
    Fine-Tuning is Better and Cheaper than In-Context Learning", 2022, arXiv:2205.05638).

    Attributes:
        factors: `[N]`, or `[K]` where `of_inputs`.
        of_inputs: whether inputs are scaled.
    """

    factors: torch.Tensor
    of_inputs: bool

    @property
    def nbytes(self) -> int:
        """See `Change`."""
        return self.factors.nbytes

    def to(self, device: torch.device) -> Scaled:
        """See `Change`."""
        return Scaled(self.factors.to(device), self.of_inputs)

    def outputs(self, module: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """See `Change`."""
        return module(x * self.factors) if self.of_inputs else y * self.factors
