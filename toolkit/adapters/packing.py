"""Find out whether a model keeps packed documents apart, which not every model of transformers does."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from toolkit.adapters import catalogue
from toolkit.adapters.spec import TrainSpec
from toolkit.data.collate import Collator
from toolkit.data.pack import concatenate
from toolkit.data.render import Example
from toolkit.errors import Problem
from toolkit.models.load import LoadedModel
from toolkit.models.modes import evaluating

LENGTH = 8
"""Tokens of each document of the probe."""


def check_packing(spec: TrainSpec, loaded: LoadedModel) -> None:
    """Refuse to pack for a model that lets a document see the one before it.

    Models that build their masks from `position_ids` keep documents apart. Others, such as OPT, Bloom and Mamba, take
    a packed row for one long text and train on it without a word.

    Raises:
        SpecError: at `data.packing`.
    """
    method = catalogue.find(spec.adapter.method)
    tasks = method is not None and method.task_field is not None
    if leak(loaded, min(spec.training.batch_size, 2), tasks=tasks) > max(1e-3, 2 * torch.finfo(loaded.model.dtype).eps):
        with_it = f" with {method.name}" if method else ""
        message = f"the model{with_it} does not keep packed documents apart; set it to false"
        raise spec.error([Problem("data.packing", message)])


def leak(loaded: LoadedModel, batch: int, *, tasks: bool = False) -> float:
    """Return how far a document's logits change with the document before it, over the spread of its logits.

    Both forward passes have the same shape, so that rounding cannot tell them apart. An adapter is moved from where
    it starts, which is mostly where it changes nothing.

    Args:
        loaded: the model.
        batch: equal rows in each forward pass; some attention kernels know packed rows only when they are alone.
        tasks: tell the model the task of each row.
    """
    size = loaded.model.config.get_text_config().vocab_size
    first, other, second = (
        Example(ids, ids) for ids in ([(start + i) * 37 % size for i in range(LENGTH)] for start in (0, LENGTH, 99))
    )
    collate = Collator(int(loaded.tokenizer.pad_token_id or 0), tasks=tasks)
    logits = []
    with torch.no_grad(), evaluating(loaded.model), _stirred(loaded.model):
        for before in (first, other):
            rows = collate([concatenate([before, second])] * batch)
            inputs = {name: value.to(loaded.model.device) for name, value in rows.items() if name != "labels"}
            logits.append(loaded.model(**inputs, use_cache=False).logits[:, LENGTH:].float())
    return float((logits[0] - logits[1]).square().mean().sqrt() / logits[0].std())


@contextmanager
def _stirred(model: nn.Module) -> Iterator[None]:
    """Add noise to the trained parameters of an adapter inside the block; the seeds of others stay as they are."""
    adapter = hasattr(model, "peft_config")
    trained = {p: p.detach().clone() for p in model.parameters() if p.requires_grad} if adapter else {}
    generator = torch.Generator().manual_seed(0)
    try:
        for value in trained:
            value.add_(torch.randn(value.shape, generator=generator).to(value) * 0.1)
        yield
    finally:
        for value, before in trained.items():
            value.copy_(before)
