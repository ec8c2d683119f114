"""Token-level fine-tuning of FlexLLM (2402.18789): exact gradients from windows of tokens, of any sizes.

A document goes through the whole model a window at a time, without gradients, and leaves its keys and values behind.
Then the windows come back, the last one first: each is computed again, and its gradients reach its own tokens and, by
the keys and values before it, the windows to come. At any moment there are the activations of one window. The paper
goes back layer by layer; through the whole model the same sums are taken, and nothing of a layer has to be kept.

So a run can be cut into pieces of a few milliseconds; `toolkit serve` trains between the steps of its requests.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from toolkit.adapters import processes
from toolkit.adapters.spec import TrainSpec
from toolkit.adapters.training._base import TrainingMethod
from toolkit.adapters.training._windows import PACE, Document, Pace, Pass, Steady, documents
from toolkit.adapters.training.streambp import METHODS
from toolkit.errors import Problem, UnsupportedError
from toolkit.models.modes import evaluating

if TYPE_CHECKING:
    from toolkit.adapters.loop import AdapterTrainer

PROBE, PIECE = 11, 4
"""Tokens that a model is tried with, and of a window then."""


class TokenWindows(TrainingMethod):
    """Exact gradients, a window of tokens at a time, through all layers."""

    class Params(TrainingMethod.Params):
        """Parameters.

        Attributes:
            window: tokens of a window.
        """

        window: Annotated[int, Field(ge=1)] = 256

    params: Params
    computes_gradients = True

    def __init__(self, params: Params, spec: TrainSpec) -> None:
        super().__init__(params, spec)
        self._pace = PACE.get() or Steady(params.window)

    def faults(self) -> Iterator[Problem]:
        """Refuse what is more than the loss of tokens, and what computes activations again by itself."""
        if self.spec.objective.method != "completion":
            yield Problem("objective", "token_windows cuts the losses of tokens; it needs completion")
        if self.spec.adapter.method not in METHODS:
            known = ", ".join(METHODS)
            yield Problem("adapter.method", f"token_windows goes with {known}, not with {self.spec.adapter.method}")
        if self.spec.training.gradient_checkpointing:
            yield Problem(
                "training.gradient_checkpointing", "token_windows keeps less than it already; set it to false"
            )
        if processes.world() > 1 or self.spec.training.fsdp or self.spec.training.deepspeed:
            yield Problem(self.where, "token_windows runs in one process")

    @contextmanager
    def around(self, trainer: AdapterTrainer) -> Iterator[None]:
        """Try the model."""
        check_windows(trainer.unwrapped())
        yield

    def begin_step(self, trainer: AdapterTrainer, batches: Sequence[Mapping[str, Any]]) -> None:
        """Count what the loss of the step is a mean over."""
        self._count = trainer._get_num_items_in_batch(list(batches), trainer.args.device)

    def step(
        self,
        trainer: AdapterTrainer,
        model: nn.Module,
        inputs: dict[str, Any],
        proceed: Callable[[dict[str, Any]], Tensor],
    ) -> Tensor:
        """Add the gradients of a micro-batch, document by document; return its part of the loss."""
        assert self._count is not None
        model.train()
        scale = 1 / self._count.float()
        losses = [back_propagate(model, document, self._pace, scale).sum() for document in documents(inputs)]
        return torch.stack(losses).sum() * scale if losses else torch.zeros_like(scale)

    def token_losses(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        """Return the cross-entropy of every trained token, `[B, T - 1]` float32, 0 elsewhere; without gradients."""
        labels = inputs["labels"]
        found = torch.zeros(labels.shape[0], labels.shape[1] - 1, device=labels.device)
        for document in documents(inputs):
            own = slice(document.start, document.start + len(document.ids))
            found[document.row, own] = score(model, document, self._pace)
        return found


def back_propagate(model: Any, document: Document, pace: Pace, scale: Tensor) -> Tensor:
    """Add the gradients of a document's losses to those of a model's parameters.

    Args:
        model: a causal language model, or PEFT's around it.
        document: its tokens.
        pace: of the windows.
        scale: of the gradients.

    Returns:
        The losses, `[T]` float32, unscaled, without gradients.
    """
    walk = Pass(model, document)
    while walk.left:
        with pace.turn() as turn:
            walk.advance(turn, scale)
    return walk.losses


def score(model: Any, document: Document, pace: Pace) -> Tensor:
    """Return the losses of a document, `[T]` float32, computed in windows without gradients."""
    walk = Pass(model, document)
    while walk.seen < len(document.ids):
        with pace.turn() as turn:
            turn.spent_forward = min(turn.forward, len(document.ids) - walk.seen)
            walk.forward(turn.spent_forward, scored=True)
    return walk.losses


def check_windows(model: Any) -> None:
    """Refuse a model that gives other losses window by window than it gives at once, by a look at a few tokens.

    Raises:
        UnsupportedError: it does, or it drops activations at random, which would be others the second time.
    """
    for name, module in model.named_modules():
        rate = module.p if isinstance(module, nn.Dropout) else getattr(module, "attention_dropout", 0)
        if isinstance(rate, float) and rate:
            message = f"token_windows computes activations twice, but {name} drops {rate} of them"
            raise UnsupportedError(f"{message}; set its dropout to 0")
    if getattr(model.config.get_text_config(), "output_router_logits", False):
        raise UnsupportedError("token_windows knows no loss of a router; set output_router_logits to false")
    ids = torch.arange(PROBE, device=model.device) * 7 % model.get_input_embeddings().weight.shape[0]
    document = Document(0, 0, ids[:-1], ids[1:])
    with torch.no_grad(), evaluating(model):
        whole = nn.functional.cross_entropy(
            model(input_ids=ids[None], use_cache=False).logits[0, :-1].float(), ids[1:], reduction="none"
        )
        pieces = score(model, document, Steady(PIECE))
    exact = model.dtype in (torch.float32, torch.float64)
    if not torch.allclose(whole, pieces, rtol=0, atol=1e-3 if exact else 0.25):
        raise UnsupportedError("token_windows: this model computes otherwise with a cache; leave token_windows out")
