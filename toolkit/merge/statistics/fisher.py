"""Diagonal Fisher information: for each weight the mean squared gradient of the log-likelihood of an example."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import cross_entropy

from toolkit.checkpoints.reader import Checkpoint
from toolkit.data.render import IGNORED, Example
from toolkit.merge.spec import DataSpec
from toolkit.merge.statistics.files import Part
from toolkit.merge.statistics.models import targets_of, tensor_names, tokens_of
from toolkit.progress import Progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def layout(model: PreTrainedModel, checkpoint: Checkpoint) -> dict[str, Part]:
    """Return the parts of a model: one number per weight."""
    names = tensor_names(model, checkpoint)
    return {names[n]: Part(names[n], tuple(p.shape)) for n, p in model.named_parameters() if n in names}


def measure(
    model: PreTrainedModel, checkpoint: Checkpoint, examples: Sequence[Example], spec: DataSpec, progress: Progress
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield each part of a model and its Fisher information, float32.

    The log-likelihood of an example is that of its trained tokens, or of tokens drawn from the model's own predictions
    in their places (`labels: model`), as in the definition of the Fisher information.
    """
    names = tensor_names(model, checkpoint)
    parameters = [(names[n], p) for n, p in model.named_parameters() if n in names]
    sums = {name: torch.zeros_like(p) for name, p in parameters}
    generator = torch.Generator().manual_seed(spec.seed)
    for example in examples:
        gradients = torch.autograd.grad(
            _loss(model, example, spec, generator), [p for _, p in parameters], allow_unused=True
        )
        for (name, _), gradient in zip(parameters, gradients, strict=True):
            if gradient is not None:
                sums[name].addcmul_(gradient, gradient)
        progress.advance()
    for name, total in sums.items():
        yield name, total.div_(len(examples))


def _loss(model: PreTrainedModel, example: Example, spec: DataSpec, generator: torch.Generator) -> torch.Tensor:
    logits = model(input_ids=tokens_of(example, model.device), use_cache=False).logits[0, :-1].float()
    targets = targets_of(example, model.device)
    if spec.labels == "model":
        drawn = torch.multinomial(logits.detach().softmax(-1).cpu(), 1, generator=generator)[:, 0]
        targets = torch.where(targets == IGNORED, targets, drawn.to(targets.device))
    return cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum")
