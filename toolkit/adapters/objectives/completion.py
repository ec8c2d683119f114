"""Predict the trained tokens of a row: completions, what an assistant says, or whole texts. The default."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from toolkit.adapters.objectives._base import Measures, Objective
from toolkit.data.collate import Collator
from toolkit.data.groups import Item
from toolkit.data.pack import alone
from toolkit.data.render import IGNORED, Example
from toolkit.data.rows import Row

if TYPE_CHECKING:
    from toolkit.adapters.loop import AdapterTrainer


class Completion(Objective):
    """The mean cross-entropy over all trained tokens of a step."""

    packs = True

    def texts(self, row: Row) -> list[Row]:
        """Return the row."""
        return [row]

    def item(self, row: Row, examples: Sequence[Example], task: int) -> Item:
        """Return the row of tokens."""
        return alone(replace(examples[0], task=task))

    def collate(self, collator: Collator) -> Any:
        """Return the collator itself."""
        return collator

    def count(self, batch: Mapping[str, Any]) -> Tensor:
        """Return the trained tokens; the first of a row is never predicted."""
        return (batch["labels"][:, 1:] != IGNORED).sum()

    def loss(self, trainer: AdapterTrainer, model: nn.Module, inputs: dict[str, Any], count: Any) -> Tensor:
        """Return the model's own loss, which some methods of PEFT add to."""
        return trainer.own_loss(model, inputs, count)

    def measure(self, trainer: AdapterTrainer, model: nn.Module, inputs: dict[str, Any]) -> Measures:
        """Return the loss without what a method of PEFT adds to it in training."""
        return {"loss": (trainer.token_losses(model, inputs).sum(), self.count(inputs))}
