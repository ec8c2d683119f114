"""One model whose weights are base plus coefficients times task vectors, and the gradient by the coefficients."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from toolkit.checkpoints.reader import Checkpoint, FolderCheckpoint
from toolkit.errors import UnsupportedError
from toolkit.merge.learning.blocks import Blocks, Values
from toolkit.merge.learning.vectors import TaskVectors
from toolkit.merge.statistics.models import fill, runnable, tensor_names
from toolkit.models.load import load_encoder

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Losses = Iterable[Callable[[], Tensor]]
"""Each computes one task's share of the loss with the model as it stands."""


class Engine:
    """Holds one model in float32; nothing else grows with its size but its gradients.

    Args:
        vectors: the task vectors.
        blocks: which tensors share a coefficient.
        model: of the base, float32, in evaluation mode; its weights are overwritten.

    Raises:
        UnsupportedError: a tensor that some model changes is no parameter of this one.
    """

    def __init__(self, vectors: TaskVectors, blocks: Blocks, model: PreTrainedModel) -> None:
        self.vectors, self.blocks, self.model = vectors, blocks, model
        stored = {own: name for name, own in tensor_names(model, vectors.base).items()}
        parameters = dict(model.named_parameters())
        strange = [name for name in vectors.jobs if name not in stored]
        if strange:
            raise UnsupportedError(
                f"{vectors.base.source}: {strange[0]} is changed by a model, but {type(model).__name__} has no such"
                f" parameter ({len(strange)} such tensors); merge models without heads, by their released names"
            )
        self.parameters = {name: parameters[stored[name]] for name in vectors.jobs}
        self._values: Values | None = None
        for parameter in model.parameters():
            parameter.requires_grad = False
        for parameter in self.parameters.values():
            parameter.requires_grad = True

    def set(self, values: Values) -> None:
        """Give the model the weights of coefficients `[M, G]`."""
        if self._values is not None and np.array_equal(values, self._values):
            return
        self._values = None  # should it be interrupted, the model is of no coefficients
        for name, parameter in self.parameters.items():
            flat = parameter.data.view(-1)
            for start, merged in self.vectors.merged(name, values[:, self.blocks.index[name]].tolist()):
                flat[start : start + len(merged)] = torch.from_numpy(merged).to(flat.device)
        self._values = values.copy()

    def expert(self, index: int) -> None:
        """Give the model the weights of one fine-tune."""
        values = np.zeros((len(self.vectors.names), len(self.blocks.groups)))
        values[index] = 1.0
        self.set(values)

    def fill(self, weights: Checkpoint) -> None:
        """Give the model the weights of a checkpoint that has the base's tensors."""
        self._values = None
        for name, parameter in self.parameters.items():
            fill(parameter, weights, name)

    def loss(self, values: Values, losses: Losses) -> float:
        """Return the sum of losses at coefficients `[M, G]`."""
        self.set(values)
        with torch.inference_mode():
            return sum(float(loss()) for loss in losses)

    def gradient(self, values: Values, losses: Losses) -> tuple[float, Values]:
        """Return the sum of losses at coefficients `[M, G]`, and its gradient by them."""
        self.set(values)
        total = 0.0
        for loss in losses:
            value = loss()
            value.backward()
            total += float(value.detach())
        return total, self._inner_products(values)

    def _inner_products(self, values: Values) -> Values:
        """Return `<dL/dtheta, tau>` for every task vector, summed over the tensors of each group."""
        found = np.zeros_like(values)
        for name, parameter in self.parameters.items():
            if parameter.grad is None:
                continue
            flat = parameter.grad.reshape(-1)
            for start, _, x in self.vectors.slices(name):
                part = flat[start : start + x.shape[1]].cpu().numpy()
                found[:, self.blocks.index[name]] += x @ part
            parameter.grad = None
        return found


def base_model(vectors: TaskVectors, device: torch.device, *, encoder: bool) -> PreTrainedModel:
    """Return the base as a model that can be run, float32.

    Raises:
        UnsupportedError: an encoder that is no folder.
    """
    base = vectors.base
    if not encoder:
        return runnable(base, device)
    if base.folder is None:
        raise UnsupportedError(f"{base.source}: an encoder is read from its folder; save it first")
    model = load_encoder(base.folder, device=device).model.float()
    if type(base) is not FolderCheckpoint:
        names = tensor_names(model, base)
        for name, parameter in model.named_parameters():
            if name in names:
                fill(parameter, base, names[name])
    return model
