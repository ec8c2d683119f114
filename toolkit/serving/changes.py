"""What adapters do to a module besides adding a low-rank product: each says what the module would give with it."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn


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
