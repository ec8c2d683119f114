"""What a run needs of memory, by part, before it starts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from toolkit.adapters.parts import parts_of
from toolkit.adapters.spec import TrainSpec
from toolkit.adapters.trainee import computes_bfloat16
from toolkit.data.collate import Collator
from toolkit.data.pack import Packed
from toolkit.models.load import LoadedModel
from toolkit.models.modes import modes_kept

_LENGTHS = (16, 32)
"""Tokens of the rows that are measured; what is saved grows by the same number of bytes with every token."""

_COPIES = {"adamw_torch": 2, "adamw_torch_fused": 2, "sgd": 0}
"""Numbers that an optimizer keeps per trained parameter, by transformers' name of it."""


def memory_parts(spec: TrainSpec, loaded: LoadedModel, collate: Collator | None, tokens: int) -> dict[str, int | None]:
    """Return the bytes of weights, gradients, optimizer and saved activations; `None` where it is not known.

    Args:
        spec: of the run.
        loaded: its model, with the adapter on.
        collate: makes its batches; `None` where they are not of single rows, so that activations are not known.
        tokens: of the largest batch, padding included.
    """
    parameters = list(loaded.model.parameters())
    trained = [p for p in parameters if p.requires_grad]
    held = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in (*parameters, *loaded.model.buffers())
    }
    gradients = sum(p.numel() * p.element_size() for p in trained)
    brought = parts_of(spec).filling("optimizer") is not None
    copies = None if brought else _COPIES.get(spec.training.optimizer)
    return {
        "weights": sum(held.values()),
        "gradients": gradients,
        "optimizer": None if copies is None else copies * gradients,
        "activations": None if collate is None else _activations(spec, loaded, collate, tokens),
    }


def _activations(spec: TrainSpec, loaded: LoadedModel, collate: Collator, tokens: int) -> int:
    """Return what the forward pass of a batch of so many tokens keeps for the backward pass."""
    kept = _at(tokens, [_measured(spec, loaded, collate, length) for length in _LENGTHS])
    if not spec.training.gradient_checkpointing:
        return kept
    # Kept are what lies outside of the layers and each layer's input, and for a while the inside of one.
    config = loaded.model.config.get_text_config()
    layers = config.num_hidden_layers
    with _checkpointing(loaded.model):
        outside = _at(tokens, [_measured(spec, loaded, collate, length) for length in _LENGTHS])
    size = 2 if computes_bfloat16(spec) else loaded.model.dtype.itemsize
    return outside + layers * tokens * config.hidden_size * size + (kept - outside) // layers


def _at(tokens: int, measured: list[int]) -> int:
    """Go on along the line through two measurements."""
    (first, second), (low, high) = _LENGTHS, measured
    return round(low + (high - low) * (tokens - first) / (second - first))


def _measured(spec: TrainSpec, loaded: LoadedModel, collate: Collator, length: int) -> int:
    batch = collate([Packed([1] * length, [1] * length, list(range(length)))])
    inputs = {name: value.to(loaded.model.device) for name, value in batch.items()}
    autocast = torch.autocast(loaded.model.device.type, torch.bfloat16, enabled=computes_bfloat16(spec))
    with torch.random.fork_rng(), modes_kept(loaded.model), autocast:
        loaded.model.train()
        return saved_bytes(loaded.model, inputs)


def saved_bytes(model: nn.Module, inputs: dict[str, Any]) -> int:
    """Return the bytes that one forward pass keeps for the backward pass, besides the model's own tensors."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, Tensor] = {}

    def keep(value: Tensor) -> Tensor:
        storage = value.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = value  # holding it keeps its address from being used again
        return value

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
        loss = model(**inputs).loss
    del loss
    return sum(value.untyped_storage().nbytes() for value in kept.values())


@contextmanager
def _checkpointing(model: Any) -> Iterator[None]:
    model.gradient_checkpointing_enable({"use_reentrant": False})
    try:
        yield
    finally:
        model.gradient_checkpointing_disable()
