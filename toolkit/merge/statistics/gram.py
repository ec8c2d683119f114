"""Inner products of the inputs of every linear layer, averaged over the tokens of a model's data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from toolkit.checkpoints.reader import Checkpoint
from toolkit.data.render import Example
from toolkit.merge.statistics.files import Part
from toolkit.merge.statistics.models import tensor_names, tokens_of
from toolkit.progress import Progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def linears(model: nn.Module, names: Mapping[str, str]) -> dict[nn.Module, Part]:
    """Return the linear layers whose weight is a tensor of its own, and where their statistics go."""
    from transformers.pytorch_utils import Conv1D

    found: dict[nn.Module, Part] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | Conv1D) and f"{name}.weight" in names:
            transposed = isinstance(module, Conv1D)
            width = module.weight.shape[0 if transposed else 1]
            found[module] = Part(names[f"{name}.weight"], (width, width), transposed)
    return found


class Grams:
    """Sums `x^T x` over everything that enters linear layers.

    Args:
        modules: layers -> their parts; the part's name is the tensor's.
    """

    def __init__(self, modules: Mapping[nn.Module, Part]) -> None:
        self.modules = modules
        self.sums: dict[str, torch.Tensor] = {}
        self.stored: dict[str, str] = {}
        self.tokens = 0
        self._last: tuple[torch.Tensor, str] | None = None

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Sum what enters the layers inside the block."""
        handles = [module.register_forward_pre_hook(self._see) for module in self.modules]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            self._last = None

    def _see(self, module: nn.Module, given: tuple[Any, ...]) -> None:
        x, name = given[0], self.modules[module].stored
        if self._last is not None and self._last[0] is x:
            leader = self._last[1]  # as for the queries, keys and values of one layer
        else:
            leader, self._last = name, (x, name)
        # What leads is settled the first time, for the sums of later ones would be of other data.
        if self.stored.setdefault(name, leader) == name:
            rows = x.detach().reshape(-1, x.shape[-1]).float()
            product = rows.T @ rows
            self.sums[name] = self.sums[name].add_(product) if name in self.sums else product

    def parts(self) -> dict[str, Part]:
        """Return the parts of the layers that were run, by tensor."""
        parts = {part.stored: part for part in self.modules.values()}
        return {name: Part(leader, parts[name].shape, parts[name].transposed) for name, leader in self.stored.items()}

    def means(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield each stored part, averaged over the tokens."""
        for name, total in self.sums.items():
            yield name, total / self.tokens


def measure(model: PreTrainedModel, checkpoint: Checkpoint, examples: Sequence[Example], progress: Progress) -> Grams:
    """Run a model on its data and return the sums of its linear layers."""
    grams = Grams(linears(model, tensor_names(model, checkpoint)))
    with torch.inference_mode(), grams.watching():
        for example in examples:
            model(input_ids=tokens_of(example, model.device), use_cache=False)
            grams.tokens += len(example.tokens)
            progress.advance()
    return grams
