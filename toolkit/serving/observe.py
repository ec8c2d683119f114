"""What a forward pass shows of a model: its layers' heads, modules that see single tokens, linears with one input."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from toolkit.kernels.grouped_lora.api import MAX_LINEARS
from toolkit.serving.memory import Heads


@dataclass
class Observed:
    """What a forward pass over one sequence of tokens showed.

    Attributes:
        heads: of each layer that attended, in order.
        rows_dim: dimension along which tokens run in the input of each token-wise module; modules that are not there
            see something else.
        groups: names of linears that read the same input, at most as many as one launch serves.
    """

    heads: dict[int, Heads] = field(default_factory=dict)
    rows_dim: dict[str, int] = field(default_factory=dict)
    groups: list[list[str]] = field(default_factory=list)

    def group_of(self, name: str) -> list[str]:
        """Return the names of the linears that read the same input as one of them, itself included."""
        return next((group for group in self.groups if name in group), [name])


@contextmanager
def observing(model: PreTrainedModel, num_tokens: int, num_kept: int) -> Iterator[Observed]:
    """Note what the forward pass inside the block shows.

    Args:
        model: whose modules are watched.
        num_tokens: of the one sequence that it is given.
        num_kept: tokens that reach the output head, where it can choose them.
    """
    seen = Observed()
    calls: list[tuple[str, torch.Tensor]] = []
    head = model.get_output_embeddings()
    handles = []
    for name, module in model.named_modules():
        if name and not any(True for _ in module.children()):
            count = (num_tokens, num_kept) if module is head else (num_tokens,)
            hook = _watch(name, calls, seen, count)
            handles.append(module.register_forward_pre_hook(hook))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
        seen.groups = _groups(calls)


def _watch(name: str, calls: list[tuple[str, torch.Tensor]], seen: Observed, counts: tuple[int, ...]) -> Any:
    met: list[str] = []

    def watch(module: nn.Module, args: tuple[Any, ...]) -> None:
        x = args[0] if len(args) == 1 else None
        dims = _rows_dims(x, counts) if isinstance(x, torch.Tensor) else []
        if not dims or met:
            seen.rows_dim.pop(name, None)  # sees something else than tokens, or is called twice
            return
        met.append(name)
        seen.rows_dim[name] = dims[0]
        weight = getattr(module, "weight", None)
        if isinstance(weight, torch.Tensor) and weight.dim() == 2 and isinstance(x, torch.Tensor):
            calls.append((name, x))

    return watch


def _rows_dims(x: torch.Tensor, counts: tuple[int, ...]) -> list[int]:
    return [d for d in range(min(2, x.dim())) if x.shape[d] in counts and all(n == 1 for n in x.shape[:d])]


def _groups(calls: list[tuple[str, torch.Tensor]]) -> list[list[str]]:
    """Return names called one after another with the same tensor."""
    groups: list[list[str]] = []
    last: torch.Tensor | None = None
    for name, x in calls:
        if groups and x is last and len(groups[-1]) < MAX_LINEARS:
            groups[-1].append(name)
        else:
            groups.append([name])
        last = x
    return groups
