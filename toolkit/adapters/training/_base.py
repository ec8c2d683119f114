"""What a way to train is: hooks into a run, of which each overrides those that it needs.

A method is one module in this folder with one subclass of `TrainingMethod`. Several may be named in one spec. Hooks
that wrap (`loss`, `step`) then hold each other, the first named outermost; a hook that only one can fill
(`token_losses`, `optimizer`, `rate`) is refused when two do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn

from toolkit.adapters.spec import SourceSpec, TrainSpec
from toolkit.data.rows import Row
from toolkit.errors import Problem
from toolkit.models.load import LoadedModel
from toolkit.specs import Spec

if TYPE_CHECKING:
    from torch.optim import Optimizer
    from transformers import TrainerCallback

    from toolkit.adapters.loop import AdapterTrainer

SLOTS = ("token_losses", "optimizer", "rate")
"""Hooks that one method fills at most."""


@dataclass(frozen=True)
class Course:
    """What is known of a run before its first step.

    Attributes:
        steps: optimizer steps.
        rows: of a step, over all micro-batches and processes, on average.
        tokens: of a step, on average.
        learning_rate: the spec's own.
    """

    steps: int
    rows: float
    tokens: float
    learning_rate: float


class TrainingMethod:
    """A way to train; a hook that is not overridden leaves the run alone.

    Attributes:
        needs_tasks: rows of different tasks are told apart: batches hold `task_ids` `[B]`, and packed rows one task.
        in_sequence: tasks are trained one after another.
        computes_gradients: its `step` does not go on to the loss, so no other method can have a part in it.
    """

    class Params(Spec):
        """No parameters."""

    needs_tasks: ClassVar[bool] = False
    in_sequence: ClassVar[bool] = False
    computes_gradients: ClassVar[bool] = False

    def __init__(self, params: Any, spec: TrainSpec) -> None:
        self.params, self.spec = params, spec

    @property
    def name(self) -> str:
        """What specs call it."""
        return type(self).__module__.rpartition(".")[2]

    @property
    def where(self) -> str:
        """Its own place in the spec, for faults."""
        place = next(i for i, chosen in enumerate(self.spec.training.methods) if chosen.method == self.name)
        return f"training.methods[{place}]"

    def faults(self) -> Iterator[Problem]:
        """Say what of the run it cannot do, before anything is read; paths are those of the spec."""
        return iter(())

    def rows(self, rows: list[Row], source: SourceSpec, loaded: LoadedModel, folder: Path | None) -> list[Row]:
        """Change the rows of a source that is trained, before they are rendered.

        Args:
            rows: as read.
            source: where they are from.
            loaded: the model before its first step.
            folder: of the run, for what a resumed run should not make again; `None` where nothing is written.
        """
        return rows

    def around(self, trainer: AdapterTrainer) -> AbstractContextManager[None]:
        """Change the model, or the trainer, for the time of the training."""
        return nullcontext()

    def begin_step(self, trainer: AdapterTrainer, batches: Sequence[Mapping[str, Any]]) -> None:
        """Look at all micro-batches of this process for the step that is about to begin."""

    def step(
        self,
        trainer: AdapterTrainer,
        model: nn.Module,
        inputs: dict[str, Any],
        proceed: Callable[[dict[str, Any]], Tensor],
    ) -> Tensor:
        """Add the gradients of a micro-batch to those that are there, and return its loss.

        Args:
            trainer: of the run.
            model: to call.
            inputs: the micro-batch, on the model's device.
            proceed: does so the ordinary way, with this micro-batch or a part of it.
        """
        return proceed(inputs)

    def loss(
        self,
        trainer: AdapterTrainer,
        model: nn.Module,
        inputs: dict[str, Any],
        proceed: Callable[[dict[str, Any]], Tensor],
    ) -> Tensor:
        """Return the part of a micro-batch in the loss of its step.

        Args:
            trainer: of the run.
            model: to call.
            inputs: the micro-batch, `task_ids` included where tasks are told apart.
            proceed: returns the objective's own.
        """
        return proceed(inputs)

    def token_losses(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        """Return the cross-entropy of every trained token, `[B, T - 1]` float32, 0 elsewhere."""
        raise NotImplementedError

    def optimizer(self, model: nn.Module, groups: list[dict[str, Any]], learning_rate: float) -> Optimizer:
        """Return the optimizer.

        Args:
            model: that is trained.
            groups: trained parameters as torch's optimizers take them: with and without weight decay.
            learning_rate: at its peak.
        """
        raise NotImplementedError

    def rate(self, course: Course) -> Callable[[int], float]:
        """Return the learning rate before each step, from 0, as a share of the spec's own."""
        raise NotImplementedError

    def callbacks(self, trainer: AdapterTrainer) -> list[TrainerCallback]:
        """Return what else is to be told of the course of the run."""
        return []

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint must hold, of tensors, numbers, texts, lists and dicts."""
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from what `state` returned."""

    def record(self) -> dict[str, Any]:
        """Return what the result's record should say of the method."""
        return {}
