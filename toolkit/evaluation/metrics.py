"""Measures of answers and of predictions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import exp
from typing import TYPE_CHECKING

from toolkit.data.collate import Collator
from toolkit.data.pack import alone
from toolkit.data.render import IGNORED, Example

if TYPE_CHECKING:
    from torch import nn


def exact_match(answers: Sequence[str], expected: Sequence[str]) -> list[bool]:
    """Tell of each answer whether it is the expected one, surrounding white space apart."""
    return [given.strip() == wanted.strip() for given, wanted in zip(answers, expected, strict=True)]


def percent(right: Sequence[bool]) -> float:
    """Return the share that is right, in percent."""
    return 100 * sum(right) / len(right)


@dataclass(frozen=True)
class Likelihood:
    """How well a model predicts the trained tokens of some examples.

    Attributes:
        loss: mean negative log-likelihood of a token, in nats.
        tokens: that were predicted.
    """

    loss: float
    tokens: int

    @property
    def perplexity(self) -> float:
        """Exponential of the loss."""
        return exp(self.loss)


def likelihood(model: nn.Module, examples: Sequence[Example], *, pad: int, batch_size: int = 16) -> Likelihood:
    """Measure a causal language model on rendered rows, teacher-forced.

    Args:
        model: a transformers causal language model.
        examples: whose labels say which tokens count.
        pad: id of the padding token.
        batch_size: rows per forward pass.
    """
    import torch
    from torch.nn.functional import cross_entropy

    collate = Collator(pad)
    device = next(model.parameters()).device
    ordered = sorted(examples, key=lambda e: len(e.tokens))
    total, tokens = 0.0, 0
    with torch.inference_mode():
        for first in range(0, len(ordered), batch_size):
            batch = collate([alone(example) for example in ordered[first : first + batch_size]])
            logits = model(input_ids=batch["input_ids"].to(device), use_cache=False).logits[:, :-1].float()
            labels = batch["labels"][:, 1:].to(device)
            total += float(cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum"))
            tokens += int((labels != IGNORED).sum())
    return Likelihood(total / tokens, tokens)
