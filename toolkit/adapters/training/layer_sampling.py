"""LISA (2403.17919): train a few layers at a time, drawn anew every so many steps.

Embeddings, last norm and head are always trained. Of the decoder layers `layers` are, drawn uniformly; the others have
no gradients and no optimizer state while they are not drawn, and start anew when they are.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field
from torch import nn

from toolkit.adapters import processes
from toolkit.adapters.catalogue import FULL
from toolkit.adapters.spec import TrainSpec
from toolkit.adapters.training._base import TrainingMethod
from toolkit.checkpoints.layout import layer_of
from toolkit.errors import Problem

if TYPE_CHECKING:
    from toolkit.adapters.loop import AdapterTrainer


class LayerSampling(TrainingMethod):
    """Some layers at a time."""

    class Params(TrainingMethod.Params):
        """Parameters.

        Attributes:
            layers: that are trained at once; of a model with fewer all are.
            every: steps from one draw to the next.
        """

        layers: Annotated[int, Field(ge=1)] = 2
        every: Annotated[int, Field(ge=1)] = 20

    params: Params

    def __init__(self, params: Params, spec: TrainSpec) -> None:
        super().__init__(params, spec)
        self.layers: list[list[nn.Parameter]] = []

    def faults(self) -> Iterator[Problem]:
        """Refuse what trains no layers of the model's own, or shards them."""
        if self.spec.adapter.method != FULL:
            yield Problem("adapter.method", f"layer_sampling trains the model's own layers; expected {FULL}")
        if processes.world() > 1 or self.spec.training.fsdp or self.spec.training.deepspeed:
            yield Problem(self.where, "layer_sampling runs in one process")

    @contextmanager
    def around(self, trainer: AdapterTrainer) -> Iterator[None]:
        """Find the layers that the spec trains; all are trained again at the end."""
        self.layers = _trained_layers(trainer.unwrapped())
        try:
            yield
        finally:
            for p in (p for layer in self.layers for p in layer):
                p.requires_grad_(True)

    def begin_step(self, trainer: AdapterTrainer, batches: Sequence[Mapping[str, Any]]) -> None:
        """Switch the layers of the step on, and others off."""
        layers = self.layers
        chosen = drawn(
            len(layers), self.params.layers, trainer.args.seed, trainer.state.global_step // self.params.every
        )
        state: Any = trainer.optimizer.state  # pyright: ignore[reportOptionalMemberAccess]
        for index, parameters in enumerate(layers):
            for p in parameters:
                p.requires_grad_(index in chosen)
                if index not in chosen:
                    p.grad = None
                    state.pop(p, None)


def _trained_layers(model: nn.Module) -> list[list[nn.Parameter]]:
    """Return the parameters of every layer that is trained."""
    found: dict[tuple[str, int], list[nn.Parameter]] = {}
    for name, p in model.named_parameters():
        place = layer_of(name)
        if place is not None and p.requires_grad:
            found.setdefault(place, []).append(p)
    return list(found.values())


def drawn(count: int, chosen: int, seed: int, period: int) -> set[int]:
    """Draw the layers of a period; the same again for the same seed, whatever ran before."""
    return set(random.Random(f"{seed} layers {period}").sample(range(count), min(chosen, count)))
