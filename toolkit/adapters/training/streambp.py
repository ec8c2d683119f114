"""StreamBP (2506.03077): exact back-propagation in chunks along the sequence, logits included.

Of a decoder layer only its input is kept. In the backward pass its keys and values are computed again, then chunk by
chunk, the last one first, its other activations: a chunk's queries look at the keys up to it, its gradient goes on to
its own tokens and, through earlier keys and values, to the tokens before. Head and cross-entropy are cut likewise, so
that logits `[T, V]` are never there as a whole. The gradients are those of plain training, to rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from toolkit.adapters import processes
from toolkit.adapters.catalogue import FULL
from toolkit.adapters.training._base import TrainingMethod
from toolkit.adapters.training._chunks import HeadRun, LayerRun, StreamedLayer, StreamedLoss, Surroundings
from toolkit.adapters.training._layers import decoder_layers, run_by
from toolkit.errors import Problem, UnsupportedError
from toolkit.models.modes import evaluating

if TYPE_CHECKING:
    from toolkit.adapters.loop import AdapterTrainer

METHODS = (FULL, "hra", "ia3", "loha", "lokr", "lora", "miss", "oft", "vera")
"""What may be trained: tested methods whose parameters lie in the layers that they change."""


class Streambp(TrainingMethod):
    """Exact gradients, a chunk at a time."""

    class Params(TrainingMethod.Params):
        """Parameters.

        Attributes:
            chunk: tokens of a chunk in the layers.
            logits_chunk: tokens of a chunk of logits.
        """

        chunk: Annotated[int, Field(ge=1)] = 1024
        logits_chunk: Annotated[int, Field(ge=1)] = 256

    params: Params

    def faults(self) -> Iterator[Problem]:
        """Refuse what does not go through layers and head in the ordinary way."""
        if self.spec.objective.method not in ("completion", "dpo"):
            yield Problem("objective", "streambp cuts the losses of tokens; it needs completion or dpo")
        if self.spec.adapter.method not in METHODS:
            known = ", ".join(METHODS)
            yield Problem("adapter.method", f"streambp goes with {known}, not with {self.spec.adapter.method}")
        if self.spec.training.gradient_checkpointing:
            yield Problem("training.gradient_checkpointing", "streambp keeps less than it already; set it to false")
        if processes.world() > 1 or self.spec.training.fsdp or self.spec.training.deepspeed:
            yield Problem(self.where, "streambp runs in one process")

    @contextmanager
    def around(self, trainer: AdapterTrainer) -> Iterator[None]:
        """Have the layers of the model keep their inputs alone."""
        with streamed(trainer.unwrapped(), self.params.chunk):
            yield

    def token_losses(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        """Return the cross-entropy of every trained token, `[B, T - 1]` float32, 0 elsewhere."""
        return token_losses(model, inputs, self.params.logits_chunk)


@contextmanager
def streamed(model: Any, chunk: int) -> Iterator[None]:
    """Run the decoder layers of a model in chunks, in training mode; they are as they were after the block.

    Args:
        model: a causal language model, or PEFT's around it.
        chunk: tokens of a chunk.

    Raises:
        UnsupportedError: its attention is not torch's, or its logits are not what its head puts out.
    """
    layers = decoder_layers(model)
    attention = model.config.get_text_config()._attn_implementation
    if not layers or attention not in ("sdpa", "eager"):
        raise UnsupportedError("streambp needs a decoder of transformers with sdpa or eager attention; leave it out")
    _check_head(model)
    with run_by(layers, [partial(_run, layer, chunk) for layer in layers]):
        yield


def _run(layer: nn.Module, chunk: int, forward: partial[Any], hidden: Tensor, *others: Any) -> Tensor:
    """Stand for the checkpointing function of a layer."""
    if any(other is not None for other in others):
        raise UnsupportedError("streambp: a layer of this model reads more than hidden states; leave streambp out")
    call = partial(forward.func, *forward.args)
    run = LayerRun(call, forward.keywords, hidden.shape[1], chunk, hidden.device)
    return StreamedLayer.apply(run, hidden, *(p for p in layer.parameters() if p.requires_grad))  # pyright: ignore[reportReturnType]


def token_losses(model: Any, inputs: dict[str, Any], chunk: int) -> Tensor:
    """Return the cross-entropy of every trained token, `[B, T - 1]` float32, 0 elsewhere.

    Args:
        model: a causal language model whose logits are what its head puts out.
        inputs: a batch with labels.
        chunk: tokens whose logits are held at once.
    """
    labels = inputs["labels"]
    head = model.get_output_embeddings()
    with _passing(head) as (seen, own):
        model(**{key: value for key, value in inputs.items() if key != "labels"}, use_cache=False)
    (hidden, around) = seen[0]
    run = HeadRun(own, labels, chunk, around)
    trained = [p for p in head.parameters() if p.requires_grad]
    return StreamedLoss.apply(run, hidden[:, -labels.shape[1] :], *trained)  # pyright: ignore[reportReturnType]


@contextmanager
def _passing(head: Any) -> Iterator[tuple[list[tuple[Tensor, Surroundings]], Callable[[Tensor], Tensor]]]:
    """Have a head note its input and pass it on; yield the notes, and what it does otherwise."""
    seen, own = [], head.forward

    def forward(hidden: Tensor) -> Tensor:
        seen.append((hidden, Surroundings(hidden.device)))
        return hidden

    head.forward = forward
    try:
        yield seen, own
    finally:
        del head.forward


def _check_head(model: Any) -> None:
    """Refuse a model that changes what its head puts out, by a look at one token."""
    head, ids = model.get_output_embeddings(), torch.zeros(1, 1, dtype=torch.long, device=model.device)
    with torch.no_grad(), evaluating(model):
        with _passing(head) as (seen, own):
            model(input_ids=ids, use_cache=False)
        logits = model(input_ids=ids, use_cache=False).logits
        hidden, around = seen[0]
        with around.casting():
            same = torch.equal(own(hidden).float(), logits.float())
    if not same:
        raise UnsupportedError("streambp: this model changes the logits of its head; leave streambp out")
