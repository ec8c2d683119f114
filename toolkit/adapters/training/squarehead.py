"""SquareHead (2310.06927): heal a model by distillation of every layer, its zeros kept.

The loss is `weight * sum_l MSE(s_l, t_l) / MSE(t_l, 0)` over the decoder layers' outputs of student and teacher, plus
the divergence of their logits, plus the task's own. Every layer counts alike, however large its states are. It is for
models that were pruned, merged or changed otherwise, and with an adapter for the base that it is on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import torch
from peft import PeftModel
from pydantic import Field
from torch import Tensor, nn
from transformers import TrainerCallback

from toolkit.adapters.catalogue import FULL
from toolkit.adapters.spec import TrainSpec
from toolkit.adapters.training._base import TrainingMethod
from toolkit.adapters.training._layers import decoder_layers
from toolkit.adapters.training._tokens import count_real, real
from toolkit.errors import Problem, UnsupportedError
from toolkit.models.load import load_model
from toolkit.models.modes import evaluating

if TYPE_CHECKING:
    from transformers import TrainerControl, TrainerState, TrainingArguments

    from toolkit.adapters.loop import AdapterTrainer


class Squarehead(TrainingMethod):
    """Distillation of every layer."""

    class Params(TrainingMethod.Params):
        """Parameters.

        Attributes:
            teacher: folder or hub id of a model of the same layers; by default the base before the first step.
            weight: of the layers.
            logits: weight of the divergence of the logits.
            task: weight of the task's own loss.
            keep_zeros: weights of matrices that are zero before the first step stay zero.
        """

        teacher: str | None = None
        weight: Annotated[float, Field(ge=0)] = 1.0
        logits: Annotated[float, Field(ge=0)] = 0.0
        task: Annotated[float, Field(ge=0)] = 1.0
        keep_zeros: bool = False

    params: Params

    def __init__(self, params: Params, spec: TrainSpec) -> None:
        super().__init__(params, spec)
        self.teacher: Any = None
        self.tokens = torch.zeros(())
        self.kept: dict[nn.Parameter, Tensor] = {}

    def faults(self) -> Iterator[Problem]:
        """Refuse what has no whole pass to compare."""
        if self.spec.objective.method != "completion":
            yield Problem("objective", "squarehead compares one pass per batch; it needs completion")
        if self.params.keep_zeros and self.spec.adapter.method != FULL:
            message = f"an adapter changes no weight of the base; expected false, or adapter.method: {FULL}"
            yield Problem(f"{self.where}.keep_zeros", message)
        if self.params.logits and any(chosen.method == "streambp" for chosen in self.spec.training.methods):
            yield Problem(f"{self.where}.logits", "streambp never holds all logits; set it to 0")

    @contextmanager
    def around(self, trainer: AdapterTrainer) -> Iterator[None]:
        """Hold the teacher, and the places of zeros.

        Raises:
            UnsupportedError: student and teacher have different layers.
        """
        model = trainer.unwrapped()
        self.teacher = self._teacher(model)
        handles = []
        if self.params.keep_zeros:
            trained = [p for p in model.parameters() if p.requires_grad and p.ndim == 2]
            self.kept = {p: p != 0 for p in trained if (p == 0).any()}
            handles = [p.register_hook(partial(torch.mul, kept)) for p, kept in self.kept.items()]
        try:
            yield
        finally:
            self.teacher, self.kept = None, {}
            for handle in handles:
                handle.remove()

    def _teacher(self, model: Any) -> Any:
        if self.params.teacher is not None:
            loaded = load_model(self.params.teacher, dtype=model.dtype, device=model.device).model
            sizes = [(len(decoder_layers(m)), m.config.get_text_config().hidden_size) for m in (model, loaded)]
            if sizes[0] != sizes[1]:
                raise UnsupportedError(
                    f"squarehead: the teacher has other layers than the student: {sizes[1]}, {sizes[0]}"
                )
            return loaded.requires_grad_(False)
        return model if isinstance(model, PeftModel) else deepcopy(model).requires_grad_(False)

    def begin_step(self, trainer: AdapterTrainer, batches: Sequence[Mapping[str, Any]]) -> None:
        """Count the tokens of the step, over which the loss is a mean."""
        self.tokens = count_real(trainer, batches)

    def loss(
        self,
        trainer: AdapterTrainer,
        model: nn.Module,
        inputs: dict[str, Any],
        proceed: Callable[[dict[str, Any]], Tensor],
    ) -> Tensor:
        """Add the part of a micro-batch in the distillation of its step."""
        if not model.training:
            return proceed(inputs)
        with states(trainer.unwrapped()) as student:
            loss = self.params.task * proceed(inputs)
        teacher = self._taught({k: v for k, v in trainer.for_model(inputs).items() if k != "labels"})
        chosen = real(inputs)
        pairs = [(s[chosen].float(), t[chosen].float()) for s, t in zip(student, teacher, strict=True)]
        share = chosen.sum() / self.tokens
        loss = loss + self.params.weight * share * squarehead(pairs[:-1])
        if self.params.logits:
            loss = loss + self.params.logits * share * divergence(*pairs[-1])
        return loss

    def _taught(self, inputs: dict[str, Any]) -> list[Tensor]:
        """Run the teacher; PEFT forgets which parameters are trained where an adapter is switched off."""
        trained = {p: p.requires_grad for p in self.teacher.parameters()}
        alone = getattr(self.teacher, "disable_adapter", nullcontext)
        with torch.no_grad(), evaluating(self.teacher), alone(), states(self.teacher) as found:
            self.teacher(**inputs, use_cache=False)
        for parameter, is_trained in trained.items():
            parameter.requires_grad_(is_trained)
        return found

    def callbacks(self, trainer: AdapterTrainer) -> list[TrainerCallback]:
        """Put the zeros back, whatever the optimizer made of them."""
        return [_Zeros(self)]


class _Zeros(TrainerCallback):
    def __init__(self, method: Squarehead) -> None:
        self.method = method

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Multiply with the mask."""
        with torch.no_grad():
            for p, kept in self.method.kept.items():
                p.mul_(kept)


@contextmanager
def states(model: Any) -> Iterator[list[Tensor]]:
    """Note what the decoder layers and the head of a model put out inside the block: `[B, T, H]` each, `[B, T, V]`."""
    found: list[Tensor] = []

    def note(module: nn.Module, given: Any, out: Any) -> None:
        found.append(out if isinstance(out, Tensor) else out[0])

    handles = [module.register_forward_hook(note) for module in (*decoder_layers(model), model.get_output_embeddings())]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def squarehead(pairs: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Return the sum over layers of the squared distance of student and teacher over the teacher's square."""
    return torch.stack([(s - t).square().mean() / t.square().mean() for s, t in pairs]).sum()


def divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the mean over tokens of the Kullback-Leibler divergence from the teacher's distribution, by logits."""
    logs = nn.functional.log_softmax(student, -1), nn.functional.log_softmax(teacher, -1)
    return nn.functional.kl_div(*logs, log_target=True, reduction="batchmean")
