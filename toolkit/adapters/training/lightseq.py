"""LightSeq's placement of checkpoints (2310.03294): at the output of attention, which then never runs twice.

Activations are computed again in the backward pass as with `gradient_checkpointing`, but for the output of the
attention kernel and the logarithms of its sums, which are all that its backward pass needs of it besides queries, keys
and values. That costs a hidden state and one number per head more for every layer and token, and saves a forward pass
of attention, which at long sequences is most of the work.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from toolkit.adapters.training._base import TrainingMethod
from toolkit.adapters.training._layers import ATTENTION_KERNELS, decoder_layers, run_by
from toolkit.errors import Problem, UnsupportedError

if TYPE_CHECKING:
    from toolkit.adapters.loop import AdapterTrainer


class Lightseq(TrainingMethod):
    """Checkpoints at the output of attention."""

    def faults(self) -> Iterator[Problem]:
        """Refuse two ways to compute activations again."""
        if self.spec.training.gradient_checkpointing:
            yield Problem("training.gradient_checkpointing", "lightseq places checkpoints itself; set it to false")
        if any(chosen.method == "streambp" for chosen in self.spec.training.methods):
            yield Problem(self.where, "streambp keeps less than lightseq already; leave one of them out")

    @contextmanager
    def around(self, trainer: AdapterTrainer) -> Iterator[None]:
        """Have the layers of the model keep their input and the output of attention."""
        with attention_kept(trainer.unwrapped()):
            yield


@contextmanager
def attention_kept(model: Any) -> Iterator[None]:
    """Checkpoint the layers of a model in training mode; they are as they were after the block.

    Raises:
        UnsupportedError: its attention is not torch's.
    """
    layers = decoder_layers(model)
    if not layers or model.config.get_text_config()._attn_implementation != "sdpa":
        raise UnsupportedError("lightseq needs a decoder of transformers with sdpa attention; leave it out")
    contexts = partial(create_selective_checkpoint_contexts, _policy)
    function = partial(checkpoint, use_reentrant=False, context_fn=contexts)
    with run_by(layers, [function] * len(layers)):
        yield


def _policy(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operator in ATTENTION_KERNELS else CheckpointPolicy.PREFER_RECOMPUTE
