"""The longest sequence whose training step stays under a cap on what torch holds at once."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.allocated import peak_bytes
from benchmarks.training.work import write_model
from toolkit.adapters.training.lightseq import attention_kept
from toolkit.adapters.training.streambp import streamed, token_losses
from toolkit.models.load import load_model
from toolkit.tables import Table

CHUNK, LOGITS_CHUNK = 256, 128
STEP = 128
"""Tokens by which a length is told."""

WAYS = ("plain", "gradient checkpointing", "lightseq", "streambp")


def longest(work: Path, *, cap: int, size: str = "8M", most: int = 1 << 14) -> tuple[Table, dict[str, Any]]:
    """Find the longest row for each way to train, by doubling and then halving the distance.

    Args:
        work: folder of what is written.
        cap: bytes that a forward and backward pass of the whole model may hold beside the weights.
        size: of the model.
        most: tokens that are tried at most.
    """
    model: Any = load_model(write_model(work / size, size)).model.train()
    found = {way: _longest(partial(_peak, model, way), cap, most) for way in WAYS}
    rows = [[way, f"{tokens:,}" + ("" if tokens < most else " or more")] for way, tokens in found.items()]
    return Table(("activations", "longest row"), rows), {"longest": found, "cap": cap, "size": size, "step": STEP}


def _longest(peak: Any, cap: int, most: int) -> int:
    low, high = 0, STEP
    while high <= most and peak(high) <= cap:
        low, high = high, 2 * high
    high = min(high, most + STEP)
    while high - low > STEP:
        middle = (low + high) // (2 * STEP) * STEP
        low, high = (middle, high) if peak(middle) <= cap else (low, middle)
    return low


def _peak(model: Any, way: str, tokens: int) -> int:
    ids = torch.randint(0, model.config.vocab_size, (1, tokens), generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": ids, "labels": ids}
    model.zero_grad(set_to_none=True)
    with _around(model, way):
        return peak_bytes(lambda: _step(model, way, inputs))


def _around(model: Any, way: str) -> AbstractContextManager[None]:
    model.activation_checkpointing_disable()
    if way == "gradient checkpointing":
        model.activation_checkpointing_enable({"use_reentrant": False})
    ways = {"streambp": lambda: streamed(model, CHUNK), "lightseq": lambda: attention_kept(model)}
    return ways[way]() if way in ways else nullcontext()


def _step(model: Any, way: str, inputs: dict[str, Tensor]) -> None:
    if way == "streambp":
        token_losses(model, inputs, LOGITS_CHUNK).sum().div(inputs["labels"].shape[1] - 1).backward()
    else:
        model(**inputs, use_cache=False).loss.backward()
