"""Choose the next token of every request from its logits; no choice depends on the other requests."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from toolkit.serving.request import Request, Sampling

GREEDY_BELOW = 1e-5
"""Temperatures below it take the most likely token: dividing by them would overflow."""


class Sampler:
    """Samples for requests, each with a generator of its own."""

    def __init__(self) -> None:
        self._generators: dict[Request, torch.Generator] = {}

    def sample(self, requests: Sequence[Request], logits: torch.Tensor) -> list[int | None]:
        """Return one token per request, or `None` where the logits are no distribution.

        Args:
            requests: whose turn it is.
            logits: `[len(requests), V]` float32; -inf is a token that cannot come.
        """
        best = logits.argmax(dim=-1).tolist()
        usable = logits.amax(dim=-1).isfinite().tolist()
        return [self._token(*row) for row in zip(requests, logits, best, usable, strict=True)]

    def _token(self, request: Request, logits: torch.Tensor, best: int, usable: bool) -> int | None:
        if not usable:
            return None
        return best if request.sampling.temperature < GREEDY_BELOW else self._draw(request, logits)

    def forget(self, request: Request) -> None:
        """Drop what is kept for a request."""
        self._generators.pop(request, None)

    def _draw(self, request: Request, logits: torch.Tensor) -> int:
        if request not in self._generators:
            generator = torch.Generator()
            if request.sampling.seed is None:
                generator.seed()
            else:
                generator.manual_seed(request.sampling.seed)
            self._generators[request] = generator
        weights = probabilities(logits.cpu(), request.sampling)
        return int(torch.multinomial(weights, 1, generator=self._generators[request]))


def probabilities(logits: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """Return the distribution `[V]` that a request draws from: temperature, then top-k, then top-p."""
    logits = logits / sampling.temperature
    if 0 < sampling.top_k < len(logits):
        cut = torch.topk(logits, sampling.top_k).values[-1]
        logits = logits.masked_fill(logits < cut, -torch.inf)
    weights = torch.softmax(logits, dim=-1)
    if sampling.top_p < 1:
        ordered, order = torch.sort(weights, descending=True)
        # A token stays if what comes before it does not reach top_p; the first always stays.
        beyond = torch.cumsum(ordered, dim=0) - ordered >= sampling.top_p
        beyond[0] = False
        weights = weights.index_fill(0, order[beyond], 0)
        weights = weights / weights.sum()
    return weights
