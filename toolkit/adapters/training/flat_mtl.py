"""Sharpness-aware minimisation, task by task (2211.13723): the gradient of every task is taken where its loss is worst.

For a task `t` with gradient `g_t` at weights `w` it is `grad L_t(w + rho g_t / |g_t|)`; the gradients of the tasks add
up to that of the step. Two passes per task and step, with the same dropout in both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from toolkit.adapters import processes
from toolkit.adapters.training._base import TrainingMethod
from toolkit.errors import Problem

if TYPE_CHECKING:
    from toolkit.adapters.loop import AdapterTrainer


class FlatMtl(TrainingMethod):
    """SAM over tasks."""

    class Params(TrainingMethod.Params):
        """Parameters.

        Attributes:
            rho: how far from the weights, as a Euclidean norm over all that is trained; 0 trains as without.
        """

        rho: Annotated[float, Field(ge=0)] = 0.05

    params: Params
    needs_tasks = True

    def faults(self) -> Iterator[Problem]:
        """Refuse what a single perturbation per task and step does not go with."""
        if self.spec.training.gradient_accumulation_steps > 1:
            message = "flat_mtl moves the weights once per task and step; raise batch_size instead"
            yield Problem("training.gradient_accumulation_steps", message)
        if processes.world() > 1:
            yield Problem(self.where, "flat_mtl runs in one process: not every process has rows of every task")
        if self.spec.objective.method != "completion":
            yield Problem("objective", "flat_mtl splits batches into rows of one task each; it needs completion")

    def step(
        self,
        trainer: AdapterTrainer,
        model: nn.Module,
        inputs: dict[str, Any],
        proceed: Callable[[dict[str, Any]], Tensor],
    ) -> Tensor:
        """Add the gradients of all tasks at their own perturbed weights; return the loss at the weights themselves."""
        parameters = [p for p in model.parameters() if p.requires_grad]
        total = [p.grad for p in parameters]
        losses = []
        for task in inputs["task_ids"].unique():
            chosen = inputs["task_ids"] == task
            rows = {key: value[chosen] for key, value in inputs.items()}
            losses.append(self._gradients(parameters, rows, proceed))
            total = [_added(before, p.grad) for before, p in zip(total, parameters, strict=True)]
        for parameter, gradient in zip(parameters, total, strict=True):
            parameter.grad = gradient
        return torch.stack(losses).sum()

    def _gradients(
        self, parameters: list[nn.Parameter], rows: dict[str, Any], proceed: Callable[[dict[str, Any]], Tensor]
    ) -> Tensor:
        """Leave the gradients at the perturbed weights in the parameters; return the loss at the weights themselves."""
        with torch.random.fork_rng():  # the second pass draws the same dropout
            _clear(parameters)
            loss = proceed(rows)
        before = [p.detach().clone() for p in parameters]
        norms = [torch.linalg.vector_norm(p.grad, dtype=torch.float64) for p in parameters if p.grad is not None]
        norm = torch.linalg.vector_norm(torch.stack(norms))
        with torch.no_grad():
            for p in parameters:
                if p.grad is not None and norm > 0:
                    p.add_(p.grad, alpha=float(self.params.rho / norm))
        _clear(parameters)
        try:
            proceed(rows)
        finally:
            with torch.no_grad():
                for p, value in zip(parameters, before, strict=True):
                    p.copy_(value)
        return loss


def _clear(parameters: list[nn.Parameter]) -> None:
    for parameter in parameters:
        parameter.grad = None


def _added(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    if a is None or b is None:
        return b if a is None else a
    return a + b
