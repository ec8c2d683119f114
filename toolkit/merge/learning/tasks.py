"""Tasks as batches: what a model predicts of some rows, and what would have been right."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from typing_extensions import override

from toolkit.data.render import IGNORED, Renderer
from toolkit.data.rows import Row, read_rows
from toolkit.data.tokenizer import Tokenizer
from toolkit.errors import DataError, Problem, UnsupportedError
from toolkit.merge.learning.heads import Head, padded, pooled, read_head
from toolkit.merge.learning.spec import LearnSpec, LearnTask
from toolkit.names import did_you_mean

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NO_LABEL = -100


class Task:
    """The rows of one task.

    Args:
        name: of the task.
        spec: of it.
        size: rows.
    """

    def __init__(self, name: str, spec: LearnTask, size: int) -> None:
        self.name, self.spec, self.size = name, spec, size

    def logits(self, model: PreTrainedModel, rows: Sequence[int]) -> Tensor:
        """Return the predictions of some rows, `[N, C]`; a row makes `predictions` of them."""
        raise UnsupportedError(f"tasks.{self.name}: has pairs of texts and no predictions; its loss is contrastive")

    def targets(self, rows: Sequence[int]) -> Tensor:
        """Return the right classes `[N]`.

        Raises:
            DataError: a row without one.
        """
        raise NotImplementedError

    def pairs(self, model: PreTrainedModel, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return the vectors of both texts of some rows, `[B, H]` each."""
        raise UnsupportedError(f"tasks.{self.name}: contrastive needs rows of text and positive, without a head")

    def predictions(self, row: int) -> int:
        """Return how many predictions a row makes."""
        return 1

    def batch(self, step: int, size: int, seed: int) -> list[int]:
        """Return the rows of a step: all of them in random order, then all in another one, and so on."""
        size = min(size, self.size)
        chosen: list[int] = []
        for position in range(step * size, (step + 1) * size):
            epoch, place = divmod(position, self.size)
            chosen.append(self._order(epoch, seed)[place])
        return chosen

    def _order(self, epoch: int, seed: int) -> list[int]:
        digest = hashlib.blake2b(f"{seed}/{self.name}/{epoch}".encode(), digest_size=7).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "little"))
        return torch.randperm(self.size, generator=generator).tolist()


class HeadTask(Task):
    """Texts classified by a linear head on an encoder."""

    def __init__(self, name: str, spec: LearnTask, rows: Sequence[Row], head: Head, texts: Texts) -> None:
        super().__init__(name, spec, len(rows))
        self.head, self.texts = head, texts
        self.tokens = [texts.encode(row, "text") for row in rows]
        self.rows = rows

    @override
    def logits(self, model: PreTrainedModel, rows: Sequence[int]) -> Tensor:
        tokens, mask = padded([self.tokens[row] for row in rows], self.texts.pad, model.device)
        return self.head(pooled(model, tokens, mask, self.head.pooling))

    @override
    def targets(self, rows: Sequence[int]) -> Tensor:
        return torch.tensor([self._label(self.rows[row]) for row in rows])

    def _label(self, row: Row) -> int:
        label = row.data.get("label")
        if label not in self.head.labels:
            known = ", ".join(self.head.labels)
            raise DataError(
                f"{row.place}: label {label!r} is none of the head's{did_you_mean(str(label), self.head.labels)}"
                f" (known: {known})"
            )
        return self.head.labels.index(label)


class PairTask(Task):
    """Pairs of texts that belong together."""

    def __init__(self, name: str, spec: LearnTask, rows: Sequence[Row], texts: Texts) -> None:
        super().__init__(name, spec, len(rows))
        self.texts = texts
        self.tokens = [(texts.encode(row, "text"), texts.encode(row, "positive")) for row in rows]

    @override
    def pairs(self, model: PreTrainedModel, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
        anchors, positives = zip(*(self.tokens[row] for row in rows), strict=True)
        return self.texts.vectors(model, anchors), self.texts.vectors(model, positives)


class LanguageTask(Task):
    """What a causal language model predicts at the positions that count."""

    def __init__(self, name: str, spec: LearnTask, rows: Sequence[Row], texts: Texts) -> None:
        super().__init__(name, spec, len(rows))
        self.texts, self.places = texts, [row.place for row in rows]
        self.tokens, self.positions, self.next = zip(*(self._render(row) for row in rows), strict=True)

    def _render(self, row: Row) -> tuple[list[int], list[int], list[int]]:
        """Return a row's tokens, the positions whose predictions count, and the tokens that come after those."""
        tokens, labels = self.texts.render(row)
        trained = [i - 1 for i, label in enumerate(labels) if label != IGNORED and i]
        if self.spec.positions == "all":
            positions = list(range(len(tokens)))
        elif self.spec.positions == "answer":
            positions = trained
        else:
            positions = trained[:1] or [len(tokens) - 1]
        if not positions:
            raise DataError(f"{row.place}: has no answer within {self.texts.max_length} tokens, so nothing counts")
        following = [*tokens[1:], NO_LABEL]
        return tokens, positions, [following[position] for position in positions]

    @override
    def logits(self, model: PreTrainedModel, rows: Sequence[int]) -> Tensor:
        tokens, mask = padded([self.tokens[row] for row in rows], self.texts.pad, model.device)
        found = model(input_ids=tokens, attention_mask=mask, use_cache=False).logits
        places = [(i, position) for i, row in enumerate(rows) for position in self.positions[row]]
        first, second = torch.tensor(places, device=found.device).T
        return found[first, second].float()

    @override
    def targets(self, rows: Sequence[int]) -> Tensor:
        for row in rows:
            if NO_LABEL in self.next[row]:
                raise DataError(f"{self.places[row]}: nothing follows a position that counts; set positions to answer")
        return torch.tensor([token for row in rows for token in self.next[row]])

    @override
    def predictions(self, row: int) -> int:
        return len(self.positions[row])


@dataclass(frozen=True)
class Texts:
    """How rows become tokens.

    Attributes:
        tokenizer: of the base.
        max_length: most tokens of a row.
        pooling: of an encoder without a head.
    """

    tokenizer: Tokenizer
    max_length: int
    pooling: str = "mean"

    @property
    def pad(self) -> int:
        """Id of the padding token."""
        return int(self.tokenizer.pad_token_id or 0)

    def encode(self, row: Row, field: str) -> list[int]:
        """Return the tokens of a field.

        Raises:
            DataError: the row has no such text.
        """
        text = row.data.get(field)
        if not isinstance(text, str):
            raise DataError(f"{row.place}: expected {field}, got {', '.join(row.data) or 'no fields'}")
        return self.tokenizer.encode(text)[: self.max_length] or [self.pad]

    def render(self, row: Row) -> tuple[list[int], list[int]]:
        """Return the tokens of a language model's row and its labels, -100 where nothing is to be answered."""
        for field in ("prompt", "text"):
            if field in row.data and "completion" not in row.data:
                tokens = self.encode(row, field)
                return tokens, [IGNORED] * len(tokens)
        example = Renderer(self.tokenizer, self.max_length).render(row)
        return example.tokens[: self.max_length], example.labels[: self.max_length]

    def vectors(self, model: PreTrainedModel, rows: Sequence[Sequence[int]]) -> Tensor:
        """Return the pooled vectors `[B, H]` of texts."""
        tokens, mask = padded(rows, self.pad, model.device)
        return pooled(model, tokens, mask, "cls" if self.pooling == "cls" else "mean")


def read_tasks(spec: LearnSpec, tokenizer: Tokenizer, context: int, loss: str | None) -> list[Task]:
    """Read the rows of all tasks.

    Args:
        spec: of the learned merge.
        tokenizer: of the base.
        context: most tokens that the model can take.
        loss: that is learned from.

    Raises:
        MissingError: no such file, or no such head.
        DataError: a row that cannot be used.
    """
    texts = Texts(tokenizer, min(spec.max_length, context), spec.pooling)
    found: list[Task] = []
    for name, task in spec.tasks.items():
        rows = read_rows(task.data)[: task.limit]
        if task.head is not None:
            found.append(HeadTask(name, task, rows, read_head(task.head), texts))
        elif loss == "contrastive":
            found.append(PairTask(name, task, rows, texts))
        else:
            found.append(LanguageTask(name, task, rows, texts))
    return found


def is_encoder(spec: LearnSpec, loss: str | None) -> bool:
    """Tell whether the body of the model is what runs."""
    return spec.encoder if spec.encoder is not None else loss == "contrastive" or any(map(_head, spec.tasks.values()))


def task_problems(spec: LearnSpec, params: Mapping[str, object], needs_data: bool) -> list[Problem]:
    """Find tasks that do not fit the method, before anything is loaded."""
    loss, encoder = params.get("loss"), is_encoder(spec, str(params.get("loss")))
    if not needs_data:
        return [Problem("tasks", f"{spec.method} looks at no data; leave them out")] if spec.tasks else []
    if not spec.tasks:
        return [Problem("tasks", f"required: what {spec.method} measures models on")]
    found: list[Problem] = []
    for name, task in spec.tasks.items():
        if encoder and loss != "contrastive" and task.head is None:
            found.append(
                Problem(f"tasks.{name}.head", "required: the other tasks have heads, or the model is an encoder")
            )
        if loss == "contrastive" and task.head is not None:
            found.append(Problem(f"tasks.{name}.head", "contrastive compares the vectors of texts, without a head"))
        if task.head is not None and "positions" in task.model_fields_set:
            found.append(Problem(f"tasks.{name}.positions", "is of language models; a head makes one prediction a row"))
        if loss == "cross_entropy" and task.head is None and task.positions == "all":
            found.append(Problem(f"tasks.{name}.positions", "nothing follows the last token; use answer"))
        if loss == "distillation" and name not in spec.models:
            found.append(
                Problem(f"tasks.{name}", f"distillation is from the model of the task's name{_near(name, spec)}")
            )
    return found


def _head(task: LearnTask) -> bool:
    return task.head is not None


def _near(name: str, spec: LearnSpec) -> str:
    return did_you_mean(name, spec.models) or f" (known: {', '.join(spec.models)})"
