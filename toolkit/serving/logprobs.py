"""Log-probabilities of tokens, generated or given: those of the model itself, before bias, penalties and temperature.

T: tokens, V: vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from toolkit.serving.request import Request, TokenLogprob

SLICE = 128
"""Rows of logits at a time: their exponentials take as much memory as they do."""


def token_logprobs(logits_TV: torch.Tensor, tokens: Sequence[int], top: int) -> list[TokenLogprob]:
    """Return what a row of logits says of its token.

    Args:
        logits_TV: `[len(tokens), V]` float32.
        tokens: one per row.
        top: how many of the most likely tokens to name beside it.
    """
    found: list[TokenLogprob] = []
    for start in range(0, len(tokens), SLICE):
        logits = logits_TV[start : start + SLICE]
        here = torch.tensor(tokens[start : start + SLICE], device=logits.device).unsqueeze(1)
        total = logits.logsumexp(dim=-1, keepdim=True)
        own = (logits.gather(1, here) - total).squeeze(1).tolist()
        best = logits.topk(min(top, logits.shape[-1]), dim=-1)
        values, ids = (best.values - total).tolist(), best.indices.tolist()
        for token, logprob, row, names in zip(tokens[start : start + SLICE], own, values, ids, strict=True):
            found.append(TokenLogprob(token, logprob, tuple(zip(names, row, strict=True))))
    return found


def answer_logprobs(
    requests: Sequence[Request], logits_BV: torch.Tensor, tokens: Sequence[int | None]
) -> list[TokenLogprob | None]:
    """Return what each row of a step says of the token that was chosen, `None` for requests that do not ask."""
    found: list[TokenLogprob | None] = [None] * len(requests)
    for i, (request, token) in enumerate(zip(requests, tokens, strict=True)):
        top = request.sampling.logprobs
        if top is not None and token is not None:
            found[i] = token_logprobs(logits_BV[i : i + 1], [token], top)[0]
    return found


def note_prompt(request: Request, first: int, logits_TV: torch.Tensor) -> None:
    """Add to a request what the logits after its prompt tokens `first, first + 1, ...` say of the tokens after those.

    A part that is computed anew replaces what was known of it.
    """
    top = request.sampling.prompt_logprobs
    assert top is not None
    assert len(request.prompt_logprobs) >= first, "parts of a prompt come in order"
    tokens = request.prompt[first + 1 : first + 1 + len(logits_TV)]
    request.prompt_logprobs[first:] = token_logprobs(logits_TV[: len(tokens)], tokens, top)
