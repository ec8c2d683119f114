"""Choose the next token of every request from its logits; no choice depends on the other requests.

The order, as in transformers and in vLLM: logit bias and penalties (`penalties`); the form of the answer (`guided`);
then the most likely token, or temperature, top-k, top-p and min-p (`filters`) and a draw.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch

from toolkit.serving.filters import probabilities
from toolkit.serving.guided import Guides, Matcher
from toolkit.serving.penalties import Penalties
from toolkit.serving.request import Request

GREEDY_BELOW = 1e-5
"""Temperatures below it take the most likely token: dividing by them would overflow."""


class Sampler:
    """Samples for requests, each with a generator of its own.

    Args:
        guides: of the model; without them no request can have a guide.
    """

    def __init__(self, guides: Guides | None = None) -> None:
        self.guides = guides
        self._matchers: dict[Request, Matcher] = {}
        self._generators: dict[Request, random.Random] = {}
        self._penalties: dict[Request, Penalties] = {}

    def sample(self, requests: Sequence[Request], logits_BV: torch.Tensor) -> list[int | None]:
        """Return one token per request, or `None` where the logits are no distribution.

        Args:
            requests: whose turn it is.
            logits_BV: `[len(requests), V]` float32; -inf is a token that cannot come.
        """
        logits_BV = self._guided(requests, self._changed(requests, logits_BV))
        tokens: list[int | None] = list(logits_BV.argmax(dim=-1).tolist())
        usable = logits_BV.amax(dim=-1).isfinite().tolist()
        drawn = [i for i, r in enumerate(requests) if usable[i] and r.sampling.temperature >= GREEDY_BELOW]
        if drawn:
            asking = [requests[i] for i in drawn]
            weights = probabilities(logits_BV[drawn], [request.sampling for request in asking])
            for i, token in zip(drawn, self._draw(asking, weights), strict=True):
                tokens[i] = token
        return [token if usable[i] else None for i, token in enumerate(tokens)]

    def forget(self, request: Request) -> None:
        """Drop what is kept for a request."""
        self._generators.pop(request, None)
        self._penalties.pop(request, None)
        self._matchers.pop(request, None)

    def fault(self, request: Request) -> str | None:
        """Return why no token could be chosen, where the form of the answer is the reason."""
        return self._matchers[request].fault if request in self._matchers else None

    def _guided(self, requests: Sequence[Request], logits_BV: torch.Tensor) -> torch.Tensor:
        rows = [i for i, request in enumerate(requests) if request.sampling.guide]
        if not rows:
            return logits_BV
        logits_BV = logits_BV.clone()
        for i in rows:
            logits_BV[i] = self._matcher(requests[i]).masked(requests[i].output, logits_BV[i])
        return logits_BV

    def _matcher(self, request: Request) -> Matcher:
        if request not in self._matchers:
            assert self.guides is not None
            assert request.sampling.guide is not None
            self._matchers[request] = self.guides.start(request.sampling.guide)
        return self._matchers[request]

    def _changed(self, requests: Sequence[Request], logits_BV: torch.Tensor) -> torch.Tensor:
        rows = [i for i, request in enumerate(requests) if request.sampling.changes_logits]
        if not rows:
            return logits_BV
        logits_BV = logits_BV.clone()
        for i in rows:
            if requests[i] not in self._penalties:
                self._penalties[requests[i]] = Penalties(requests[i], logits_BV[i])
            logits_BV[i] = self._penalties[requests[i]].apply(logits_BV[i])
        return logits_BV

    def _draw(self, requests: Sequence[Request], weights_BV: torch.Tensor) -> list[int]:
        """Invert each row's cumulative distribution at one number of its request's own generator."""
        numbers = [[self._generator(request).random()] for request in requests]
        # In float32 the sum over a vocabulary loses the unlikely tokens.
        sums_BV = weights_BV.double().cumsum(dim=-1)
        total = sums_BV[:, -1:]
        target = torch.tensor(numbers, dtype=torch.float64, device=weights_BV.device) * total
        below = torch.nextafter(total, torch.zeros_like(total))  # a product may round up to the total
        return torch.searchsorted(sums_BV, torch.minimum(target, below), right=True).squeeze(1).tolist()

    def _generator(self, request: Request) -> random.Random:
        if request not in self._generators:
            seed = request.sampling.seed
            # Python's generator drops the sign of a seed.
            self._generators[request] = random.Random(None if seed is None else seed % 2**64)
        return self._generators[request]
