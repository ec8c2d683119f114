"""Fewer active neurons (2402.01911, DEFT): a penalty on the density of the feed-forward networks' activations.

It is the mean over layers of the mean of `a^2 / (a^2 + eps)` over neurons and the tokens up to a row's last
trained one, a smooth stand-in for the share of activations that are not zero, and is added to the loss of the step. Of
smooth activations such as SiLU few are exactly zero, so the density that is reported is the share above a threshold.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from toolkit.adapters.spec import TrainSpec
from toolkit.adapters.training._base import TrainingMethod
from toolkit.adapters.training._tokens import count_real, real
from toolkit.errors import Problem, UnsupportedError

if TYPE_CHECKING:
    from toolkit.adapters.loop import AdapterTrainer

_NAMES = ("act_fn", "act", "activation_fn", "intermediate_act_fn")
"""What transformers calls the activation of a feed-forward network."""


class ActivationDensity(TrainingMethod):
    """A penalty on active neurons."""

    class Params(TrainingMethod.Params):
        """Parameters.

        Attributes:
            weight: of the penalty; with 0 it is only measured.
            eps: below whose root an activation counts little.
            threshold: magnitude above which one counts as active in the record.
        """

        weight: Annotated[float, Field(ge=0)] = 1.0
        eps: Annotated[float, Field(gt=0)] = 1e-4
        threshold: Annotated[float, Field(ge=0)] = 1e-2

    params: Params

    def __init__(self, params: Params, spec: TrainSpec) -> None:
        super().__init__(params, spec)
        self.seen: list[Tensor] = []
        self.tokens = torch.zeros(())
        self.first: float | None = None
        self.last: float | None = None

    def faults(self) -> Iterator[Problem]:
        """Refuse what never has all activations of a graph."""
        if self.spec.objective.method != "completion":
            yield Problem("objective", "activation_density looks at one pass per batch; it needs completion")
        others = {chosen.method for chosen in self.spec.training.methods}
        for other in sorted(others & {"streambp", "flat_mtl"}):
            yield Problem(self.where, f"{other} runs a batch in parts; leave one of them out")

    @contextmanager
    def around(self, trainer: AdapterTrainer) -> Iterator[None]:
        """Look at the activations of every layer.

        Raises:
            UnsupportedError: there are none.
        """
        found = [m for name, m in trainer.unwrapped().named_modules() if name.rpartition(".")[2] in _NAMES]
        if not found:
            raise UnsupportedError("activation_density: this model has no activations that are modules; leave it out")
        handles = [module.register_forward_hook(self._look) for module in found]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            self.seen = []

    def _look(self, module: nn.Module, given: Any, out: Tensor) -> None:
        if module.training:
            self.seen.append(out)

    def begin_step(self, trainer: AdapterTrainer, batches: Sequence[Mapping[str, Any]]) -> None:
        """Count the tokens of the step, over which the penalty is a mean."""
        self.tokens = count_real(trainer, batches)

    def loss(
        self,
        trainer: AdapterTrainer,
        model: nn.Module,
        inputs: dict[str, Any],
        proceed: Callable[[dict[str, Any]], Tensor],
    ) -> Tensor:
        """Add the part of a micro-batch in the penalty of its step."""
        self.seen = []
        loss = proceed(inputs)
        if not model.training:
            return loss
        seen, self.seen = self.seen, []
        kept = real(inputs)
        with torch.no_grad():
            active = torch.stack([(a[kept].abs() > self.params.threshold).float().mean() for a in seen]).mean()
        self.first, self.last = float(active) if self.first is None else self.first, float(active)
        if not self.params.weight:
            return loss
        share = kept.sum() / self.tokens
        return loss + self.params.weight * share * penalty([a[kept] for a in seen], self.params.eps)

    def record(self) -> dict[str, Any]:
        """Return the share of active neurons in the first and the last batch."""
        return {"activation_density": {"first": self.first, "last": self.last}}


def penalty(activations: Sequence[Tensor], eps: float) -> Tensor:
    """Return the mean over layers of the mean of `a^2 / (a^2 + eps)`."""
    squares = [a.float().square() for a in activations]
    return torch.stack([(s / (s + eps)).mean() for s in squares]).mean()
