"""What changes the logits of a request before a token is chosen: logit bias and penalties. V: vocabulary."""

from __future__ import annotations

import torch

from toolkit.serving.request import Request


class Penalties:
    """The bias of one request, and which tokens it has met.

    The order is that of transformers and of vLLM: bias, repetition penalty, frequency and presence penalties. The
    repetition penalty (Keskar et al., "CTRL", 2019, arXiv:1909.05858) looks at prompt and answer, the other two, which
    are OpenAI's, at the answer alone.

    Args:
        request: whose sampling `changes_logits`.
        logits_V: of its first step; for their size and device.
    """

    def __init__(self, request: Request, logits_V: torch.Tensor) -> None:
        self.request = request
        self._counts_V = torch.zeros_like(logits_V)
        self._seen_V = torch.zeros_like(logits_V, dtype=torch.bool)
        self._seen_V[self._ids(request.prompt)] = True
        self._counted = 0
        bias = request.sampling.logit_bias
        self._biased = torch.tensor(list(bias), dtype=torch.long, device=logits_V.device)
        self._bias = torch.tensor(list(bias.values()), dtype=logits_V.dtype, device=logits_V.device)

    def apply(self, logits_V: torch.Tensor) -> torch.Tensor:
        """Return the changed logits `[V]`, looking at all that was generated so far."""
        sampling = self.request.sampling
        self._count()
        logits_V = logits_V.index_add(0, self._biased, self._bias)
        if sampling.repetition_penalty != 1:
            weaker = logits_V * sampling.repetition_penalty
            stronger = logits_V / sampling.repetition_penalty
            logits_V = torch.where(self._seen_V, torch.where(logits_V < 0, weaker, stronger), logits_V)
        logits_V = logits_V - sampling.frequency_penalty * self._counts_V
        return logits_V - sampling.presence_penalty * self._counts_V.clamp(max=1)

    def _count(self) -> None:
        new = self._ids(self.request.output[self._counted :])
        self._counted = len(self.request.output)
        self._counts_V.index_add_(0, new, torch.ones_like(new, dtype=self._counts_V.dtype))
        self._seen_V[new] = True

    def _ids(self, tokens: list[int]) -> torch.Tensor:
        # An embedding can have rows that the head lacks; they are never generated, so nothing counts them.
        known = [token for token in tokens if token < len(self._counts_V)]
        return torch.tensor(known, dtype=torch.long, device=self._counts_V.device)
