"""The served model as adapters see it: its parameters and modules by their own names, whatever has been wrapped."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from toolkit.errors import CheckpointError, UnsupportedError
from toolkit.serving.observe import Observed


@dataclass(frozen=True)
class Target:
    """A model before anything is wrapped.

    Attributes:
        model: itself.
        modules: by name, as they were.
        parameters: by name.
        head: name of the output head.
        observed: what a forward pass showed.
    """

    model: PreTrainedModel
    modules: Mapping[str, nn.Module]
    parameters: Mapping[str, torch.Tensor]
    head: str
    observed: Observed

    @classmethod
    def of(cls, model: PreTrainedModel, observed: Observed) -> Target:
        """Take down the names of a model."""
        modules, head = dict(model.named_modules()), model.get_output_embeddings()
        name = next((name for name, module in modules.items() if module is head), "")
        return cls(model, modules, dict(model.named_parameters(remove_duplicate=False)), name, observed)

    def group_of(self, name: str) -> list[str]:
        """Return the linears that read the same input as one of them, itself included; an embedding is alone."""
        if isinstance(self.modules[name], nn.Embedding):
            return [name]
        return self.observed.group_of(name)

    def token_wise(self, name: str, source: str) -> nn.Module:
        """Return a module that maps each token by itself, so that rows of a batch can differ in it.

        Raises:
            CheckpointError: no such module.
            UnsupportedError: it sees something else than the tokens of the batch.
        """
        if name not in self.modules:
            raise CheckpointError(f"{source}: adapts {name}, which the served model does not have")
        if name not in self.observed.rows_dim:
            raise UnsupportedError(
                f"{source}: adapts {name}, which does not see the tokens of a batch one by one, so requests cannot"
                " differ in it"
            )
        return self.modules[name]

    def widths(self, name: str, source: str) -> tuple[int, int]:
        """Return inputs and outputs of a linear, or vocabulary and features of an embedding.

        Raises:
            CheckpointError: no such module.
            UnsupportedError: the module is neither.
        """
        module = self.token_wise(name, source)
        if isinstance(module, nn.Embedding):
            return module.num_embeddings, module.embedding_dim
        for inputs, outputs in (("in_features", "out_features"), ("nx", "nf")):  # Conv1D has the latter
            if hasattr(module, inputs) and hasattr(module, outputs):
                return int(getattr(module, inputs)), int(getattr(module, outputs))
        raise UnsupportedError(f"{source}: adapts {name}, which is neither a linear layer nor an embedding")

    def tied(self, parameter: str) -> list[str]:
        """Return the other names under which the model has a parameter."""
        own = self.parameters.get(parameter)
        return [name for name, other in self.parameters.items() if other is own and name != parameter]

    def owner(self, parameter: str, source: str) -> tuple[str, str]:
        """Return the module that a parameter is of, and its name there.

        Raises:
            CheckpointError: no such parameter.
            UnsupportedError: requests cannot differ in that module.
        """
        if parameter not in self.parameters:
            raise CheckpointError(f"{source}: stores {parameter}, which the served model does not have")
        module, _, own = parameter.rpartition(".")
        self.token_wise(module, source)
        return module, own
