"""One learned merge under way: its models, its data, its folder, and what came out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolkit.checkpoints.reader import Checkpoint
from toolkit.merge.learning.blocks import Blocks, Values
from toolkit.merge.learning.spec import LearnParams, LearnSpec
from toolkit.merge.learning.vectors import TaskVectors
from toolkit.tables import Table

if TYPE_CHECKING:
    import torch

    from toolkit.data.tokenizer import Tokenizer
    from toolkit.merge.learning.engine import Engine
    from toolkit.merge.learning.tasks import Task


@dataclass(frozen=True)
class Outcome:
    """What a method learned.

    Attributes:
        values: coefficients `[M, G]`; `None` where the method writes another thing than one merge.
        numbers: that JSON can hold.
        tables: what to show besides the coefficients.
        data: what of the data was looked at, in a few words.
    """

    values: Values | None
    numbers: Mapping[str, Any] = field(default_factory=dict)
    tables: Sequence[Table] = ()
    data: str = "no data"


@dataclass
class Session:
    """What a method works with; the model and the data are loaded when they are first asked for.

    Attributes:
        spec: what was asked for.
        params: of the method.
        vectors: the task vectors.
        blocks: which tensors share a coefficient.
        folder: of the unfinished result, where a method keeps what it needs to go on after a kill.
        fingerprint: of all that the result depends on.
        quiet: show no progress.
    """

    spec: LearnSpec
    params: LearnParams
    vectors: TaskVectors
    blocks: Blocks
    folder: Path
    fingerprint: str
    quiet: bool = False

    @property
    def models(self) -> int:
        """How many fine-tunes there are."""
        return len(self.vectors.names)

    @cached_property
    def device(self) -> torch.device:
        """Where the model runs."""
        from toolkit.models.load import pick_device

        return pick_device(self.spec.device)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """Of the base."""
        from toolkit.merge.statistics.models import tokenizer_of

        return tokenizer_of(self.vectors.base)

    @cached_property
    def tasks(self) -> list[Task]:
        """The tasks with their rows."""
        from toolkit.merge.learning.tasks import read_tasks

        context = int(self.vectors.base.config.get("max_position_embeddings") or self.spec.max_length)
        return read_tasks(self.spec, self.tokenizer, context, self._loss)

    @cached_property
    def engine(self) -> Engine:
        """The model whose weights are the merge's."""
        from toolkit.merge.learning.engine import Engine, base_model
        from toolkit.merge.learning.tasks import is_encoder

        encoder = is_encoder(self.spec, self._loss)
        return Engine(self.vectors, self.blocks, base_model(self.vectors, self.device, encoder=encoder))

    @property
    def base(self) -> Checkpoint:
        """The base."""
        return self.vectors.base

    @property
    def _loss(self) -> str | None:
        return getattr(self.params, "loss", None)

    def losses(self, batches: Mapping[str, Sequence[int]]) -> Iterator[Callable[[], torch.Tensor]]:
        """Yield what computes each task's share of the loss on some of its rows."""
        from toolkit.merge.learning.objective import task_loss

        for task in self.tasks:
            yield lambda task=task: task_loss(self, task, batches[task.name])
