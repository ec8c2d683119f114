"""Direct preference optimization: make chosen answers likelier than rejected ones, measured from the base (2305.18290).

For log-probabilities `p` of the trained tokens of an answer, and those of the base `q`,
`loss = -log sigmoid(beta ((p_chosen - q_chosen) - (p_rejected - q_rejected)))`, the mean over the pairs of a step.
The base is the model with its adapter off, so that no second model is held.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from toolkit.adapters.catalogue import FULL
from toolkit.adapters.objectives._base import Measures, Objective, model_inputs
from toolkit.data.render import IGNORED
from toolkit.data.rows import Row
from toolkit.errors import DataError, Problem
from toolkit.models.modes import evaluating

if TYPE_CHECKING:
    from toolkit.adapters.loop import AdapterTrainer


class Dpo(Objective):
    """Preference pairs: rows of `prompt`, `chosen` and `rejected`, texts or lists of messages."""

    class Params(Objective.Params):
        """Parameters.

        Attributes:
            beta: the larger, the nearer the model stays to the base.
            label_smoothing: share of the pairs that are taken to be labelled the wrong way round.
        """

        beta: Annotated[float, Field(gt=0)] = 0.1
        label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0

    params: Params

    def faults(self) -> Iterator[Problem]:
        """Refuse what has no base beside it."""
        if self.spec.adapter.method == FULL:
            yield Problem("objective", "dpo compares with the base, which full training changes; take an adapter")

    def texts(self, row: Row) -> list[Row]:
        """Return the prompt with the chosen answer, and with the rejected one."""
        return [_answered(row, "chosen"), _answered(row, "rejected")]

    def measure(self, trainer: AdapterTrainer, model: nn.Module, inputs: dict[str, Any]) -> Measures:
        """Return the loss, how often the chosen answer gained more, and by how much."""
        real = inputs["classes"] >= 0
        given = model_inputs(inputs)
        reference = self._reference(trainer, given)
        gain = _sums(trainer.token_losses(model, given), given["labels"]) - reference
        chosen, rejected = gain.chunk(2)
        margin, count = self.params.beta * (chosen - rejected), real.sum()
        wrong = self.params.label_smoothing
        losses = -(1 - wrong) * logsigmoid(margin) - wrong * logsigmoid(-margin)
        return {
            "loss": (losses[real].sum(), count),
            "accuracy": ((margin > 0)[real].sum(), count),
            "margin": (margin[real].detach().sum(), count),
        }

    def _reference(self, trainer: AdapterTrainer, given: dict[str, Any]) -> Tensor:
        """Return the log-probabilities under the base; PEFT then forgets which parameters are trained."""
        base: Any = trainer.unwrapped()
        trained = {p: p.requires_grad for p in base.parameters()}
        with torch.no_grad(), evaluating(base), base.disable_adapter():
            found = _sums(trainer.token_losses(base, given), given["labels"])
        for parameter, is_trained in trained.items():
            parameter.requires_grad_(is_trained)
        return found


def _sums(losses: Tensor, labels: Tensor) -> Tensor:
    """Return the log-probability of the trained tokens of every row, `[N]`."""
    return -(losses * (labels[:, 1:] != IGNORED)).sum(dim=1)


def _answered(row: Row, field: str) -> Row:
    prompt, answer = row.data.get("prompt"), row.data.get(field)
    if isinstance(prompt, str) and isinstance(answer, str):
        return Row({"prompt": prompt, "completion": answer}, row.place)
    if isinstance(answer, list) and (prompt is None or isinstance(prompt, list)):
        return Row({"messages": [*(prompt or []), *answer]}, row.place)
    raise DataError(
        f"{row.place}: expected prompt, chosen and rejected, all texts or all lists of messages,"
        f" got {', '.join(row.data) or 'no fields'}"
    )
