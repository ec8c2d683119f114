"""The losses whose gradients move coefficients; each is a mean over what is predicted."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def entropy(logits: Tensor) -> Tensor:
    """Return the mean Shannon entropy, in nats, of the predictions `[N, C]`."""
    log_probabilities = functional.log_softmax(logits.float(), -1)
    return -(log_probabilities.exp() * log_probabilities).sum(-1).mean()


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the mean negative log-likelihood, in nats, of the right classes `[N]` under `[N, C]`."""
    return functional.cross_entropy(logits.float(), targets)


def contrastive(anchors: Tensor, positives: Tensor, temperature: float) -> Tensor:
    """Return InfoNCE: how well the cosine tells each anchor's positive from those of the other rows.

    Oord et al., "Representation Learning with Contrastive Predictive Coding", 2018 (arXiv:1807.03748).

    Args:
        anchors: `[B, H]`.
        positives: `[B, H]`.
        temperature: that cosines are divided by.
    """
    cosines = functional.normalize(anchors, dim=-1) @ functional.normalize(positives, dim=-1).T
    return functional.cross_entropy(cosines / temperature, torch.arange(len(cosines), device=cosines.device))


def distillation(logits: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Return the mean divergence KL(teacher || model) of softened predictions, both from logits `[N, C]`."""
    own = functional.log_softmax(logits.float() / temperature, -1)
    wanted = functional.log_softmax(teacher.float() / temperature, -1)
    return functional.kl_div(own, wanted, reduction="batchmean", log_target=True)
