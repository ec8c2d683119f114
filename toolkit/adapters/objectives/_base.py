"""What an objective is: which rows it reads, what batches it makes of them, and the loss over a batch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from toolkit.adapters.spec import TrainSpec
from toolkit.data.collate import Collator
from toolkit.data.groups import Group, GroupCollator, Item
from toolkit.data.pack import alone
from toolkit.data.render import Example
from toolkit.data.rows import Row
from toolkit.errors import DataError, Problem
from toolkit.models.load import LoadedModel
from toolkit.specs import Spec

if TYPE_CHECKING:
    from toolkit.adapters.loop import AdapterTrainer

Measures = Mapping[str, tuple[Tensor | float, Tensor | float]]
"""Sums and counts of what is measured on a batch, by name; `loss` is one of them."""


class Objective:
    """An objective; a subclass in a file of this folder is one that a spec may name.

    Attributes:
        task_type: PEFT's word for the kind of model.
        packs: rows of one document may be put together into longer ones.
        whole: what is learned is about texts, not about their tokens.
    """

    class Params(Spec):
        """No parameters."""

    task_type: ClassVar[str] = "CAUSAL_LM"
    packs: ClassVar[bool] = False
    whole: ClassVar[bool] = False

    def __init__(self, params: Any, spec: TrainSpec) -> None:
        self.params, self.spec = params, spec

    def faults(self) -> Iterator[Problem]:
        """Say what of the run it cannot do, before anything is read; paths are those of the spec."""
        return iter(())

    def survey(self) -> None:
        """Look at the data before the model is loaded."""

    def model(self, loaded: LoadedModel) -> AbstractContextManager[LoadedModel]:
        """Return the model that is trained, around the base; the base is as it was when the block ends."""
        return nullcontext(loaded)

    def texts(self, row: Row) -> list[Row]:
        """Return the texts of a row, each as a row that renders by itself.

        Raises:
            DataError: the row is not of the form that is learned from.
        """
        raise NotImplementedError

    def item(self, row: Row, examples: Sequence[Example], task: int) -> Item:
        """Put the rendered texts of a row together."""
        return Group(tuple(alone(example) for example in examples), task=task)

    def collate(self, collator: Collator) -> Any:
        """Return what makes a batch of items."""
        return GroupCollator(collator)

    def count(self, batch: Mapping[str, Any]) -> Tensor:
        """Return how many things of a batch the loss is a mean over."""
        return (batch["classes"] >= 0).sum()

    def loss(self, trainer: AdapterTrainer, model: nn.Module, inputs: dict[str, Any], count: Any) -> Tensor:
        """Return the loss of a batch: its sum over `count`, the number of things in the whole step."""
        total, _ = self.measure(trainer, model, inputs)["loss"]
        return torch.as_tensor(total) / count

    def measure(self, trainer: AdapterTrainer, model: nn.Module, inputs: dict[str, Any]) -> Measures:
        """Return sums over a batch, with gradients where they are on."""
        raise NotImplementedError

    def record(self) -> dict[str, Any]:
        """Return what the result's record should say of the objective."""
        return {}


def model_inputs(inputs: Mapping[str, Any], *, labels: bool = True) -> dict[str, Any]:
    """Return what of a batch of groups the model is given."""
    dropped = ("classes", "lengths") if labels else ("classes", "lengths", "labels")
    return {key: value for key, value in inputs.items() if key not in dropped}


def text_of(row: Row, field: str) -> Row:
    """Return the text in a field as a row of its own.

    Raises:
        DataError: there is none.
    """
    value = row.data.get(field)
    if not isinstance(value, str):
        got = f"got {', '.join(row.data) or 'no fields'}" if field not in row.data else f"got {value!r}"
        raise DataError(f"{row.place}: {field} must be a text, {got}")
    return Row({"text": value}, row.place)
