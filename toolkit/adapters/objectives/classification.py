"""Classify texts: a linear head on the hidden state of the last token, trained with the adapter (PEFT's SEQ_CLS)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from toolkit.adapters.objectives._base import Measures, Objective, model_inputs, text_of
from toolkit.adapters.spec import TrainSpec
from toolkit.data.groups import Group, Item
from toolkit.data.pack import alone
from toolkit.data.render import IGNORED, Example
from toolkit.data.rows import Row, read_source
from toolkit.errors import DataError, UnsupportedError
from toolkit.models.load import LoadedModel
from toolkit.names import did_you_mean

if TYPE_CHECKING:
    from toolkit.adapters.loop import AdapterTrainer


class Classification(Objective):
    """Rows of `text` and `label`; the mean cross-entropy over the rows of a step."""

    class Params(Objective.Params):
        """Parameters.

        Attributes:
            labels: in the order of the head's outputs; by default those of the training data, sorted.
        """

        labels: Annotated[tuple[str | int, ...], Field(min_length=2)] | None = None

    params: Params
    task_type = "SEQ_CLS"
    whole = True

    def __init__(self, params: Params, spec: TrainSpec) -> None:
        super().__init__(params, spec)
        self.numbers = {str(label): i for i, label in enumerate(params.labels or ())}

    def survey(self) -> None:
        """Find the labels of the training data, where the spec does not name them."""
        if self.numbers:
            return
        found: set[str] = set()
        for source in self.spec.data.sources():
            rows = read_source(source.path, split=source.split, subset=source.subset, fields=source.fields)
            found |= {_label(row) for row in rows}
        if len(found) < 2:
            path = self.spec.data.sources()[0].path
            raise DataError(f"{path}: every row has the label {min(found)!r}; a classifier needs at least two labels")
        self.numbers = {label: i for i, label in enumerate(sorted(found))}

    @contextmanager
    def model(self, loaded: LoadedModel) -> Iterator[LoadedModel]:
        """Put a new head on the body of the base; only the head is made anew."""
        from transformers import AutoModelForSequenceClassification

        own: Any = loaded.model
        config = type(own.config).from_dict(own.config.to_dict())
        config.id2label = dict(enumerate(self.numbers))
        config.label2id = dict(self.numbers)
        config.pad_token_id = int(loaded.tokenizer.pad_token_id or 0)
        try:
            with torch.device("meta"):
                made: Any = AutoModelForSequenceClassification.from_config(config)
        except ValueError:
            raise UnsupportedError(f"{loaded.source}: transformers has no classifier of this kind of model") from None
        prefix = made.base_model_prefix
        for name, module in made.named_children():
            if name != prefix:
                module.to_empty(device=own.device).to(own.dtype)
                module.apply(made._init_weights)
        setattr(made, prefix, own.base_model)
        made.name_or_path = own.name_or_path
        yield LoadedModel(loaded.source, made.eval(), loaded.tokenizer)

    def texts(self, row: Row) -> list[Row]:
        """Return the text."""
        return [text_of(row, "text")]

    def item(self, row: Row, examples: Sequence[Example], task: int) -> Item:
        """Return the text with the number of its label.

        Raises:
            DataError: a label that is not among those of the training data.
        """
        label = _label(row)
        if label not in self.numbers:
            known = ", ".join(list(self.numbers)[:20])
            raise DataError(f"{row.place}: unknown label {label!r}{did_you_mean(label, self.numbers)} (known: {known})")
        return Group((alone(examples[0]),), self.numbers[label], task)

    def measure(self, trainer: AdapterTrainer, model: nn.Module, inputs: dict[str, Any]) -> Measures:
        """Return the loss and how many classes are right."""
        classes = inputs["classes"]
        logits: Tensor = model(**model_inputs(inputs, labels=False), use_cache=False).logits.float()
        total = cross_entropy(logits, classes, ignore_index=IGNORED, reduction="sum")
        real = classes >= 0
        return {"loss": (total, real.sum()), "accuracy": ((logits.argmax(1) == classes)[real].sum(), real.sum())}

    def record(self) -> dict[str, Any]:
        """Return the labels in the order of the head's outputs."""
        return {"labels": list(self.numbers)}


def _label(row: Row) -> str:
    label = row.data.get("label")
    if isinstance(label, bool) or not isinstance(label, str | int):
        got = f"{label!r}" if "label" in row.data else f"no field 'label'{did_you_mean('label', row.data)}"
        raise DataError(f"{row.place}: the label must be a text or a whole number, got {got}")
    return str(label)
