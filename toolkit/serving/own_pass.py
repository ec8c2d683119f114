"""Adapters that are no change of weights: a model of their own, beside the base in the weights of the base.

Where an adapter maps every token by itself, as a bottleneck after a sublayer does, its requests go through its model
together, with pages of the cache like all others. Where it does not, as with a network that keeps states of its own
for every token, they run one by one, each with transformers' cache. Which of the two it is, a trial shows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from transformers import DynamicCache, PreTrainedModel

from toolkit.errors import UnsupportedError
from toolkit.models.logits import keeps_logits
from toolkit.serving.attention import NAME
from toolkit.serving.loading import set_attention
from toolkit.serving.memory import Heads, Memory
from toolkit.serving.passes import Part, allowed, distance, paged_logits
from toolkit.serving.request import Request

TRIED, PAGE = 19, 4
"""Tokens of the sequences that an adapter is tried with, and of a page of theirs."""


@dataclass
class OwnPass:
    """A model with an adapter in it.

    Attributes:
        model: shares the weights of the base.
        is_paged: its requests run together, and not one by one.
        nbytes: of the adapter.
    """

    model: PreTrainedModel
    is_paged: bool
    nbytes: int
    _caches: WeakKeyDictionary[Request, tuple[Any, int]] = field(default_factory=WeakKeyDictionary, repr=False)

    def __post_init__(self) -> None:
        set_attention(self.model, NAME if self.is_paged else ordinary_attention(self.model))

    def logits(self, request: Request, count: int, keep: Sequence[int]) -> torch.Tensor:
        """Run the next tokens of a request that runs by itself.

        Args:
            request: whose cache is begun anew where it is not that of the tokens that are computed.
            count: tokens.
            keep: those of them after which logits are wanted.

        Returns:
            `[len(keep), V]` float32.
        """
        done, stop = request.num_computed, request.num_computed + count
        cache, seen = self._caches.pop(request, (None, 0))
        if cache is None or seen != done:
            cache, seen = DynamicCache(config=self.model.config), 0
        rows = [done - seen + at for at in keep]
        logits = _cached(self.model, request.tokens[seen:stop], cache, rows)
        self._caches[request] = cache, stop
        return logits


def ordinary_attention(model: PreTrainedModel) -> str:
    """Return the attention of transformers that computes what a model asks for."""
    capped = getattr(model.config.get_text_config(), "attn_logit_softcapping", None)
    return "eager" if capped is not None else "sdpa"


def _cached(model: Any, tokens: Sequence[int], cache: Any, keep: Sequence[int]) -> torch.Tensor:
    rows = torch.tensor(list(keep), dtype=torch.long, device=model.device)
    kept = keeps_logits(model)
    output = model(
        input_ids=torch.tensor([list(tokens)], device=model.device),
        past_key_values=cache,
        use_cache=cache is not None,
        **({"logits_to_keep": rows} if kept else {}),
    )
    return (output.logits[0] if kept else output.logits[0, rows]).float()


def is_paged(model: PreTrainedModel, heads: Mapping[int, Heads]) -> bool:
    """Try a model with an adapter in it; tell whether its requests can run together.

    Args:
        model: its attention is changed.
        heads: of each layer of the base that attends.

    Raises:
        UnsupportedError: it gives other logits token by token than it gives at once, or fails.
    """
    vocabulary = cast(torch.Tensor, model.get_input_embeddings().weight).shape[0]
    texts = [[(first + 97 * i) % vocabulary for i in range(TRIED)] for first in (31, 8)]
    most = allowed(model.dtype)
    try:
        with torch.inference_mode():
            set_attention(model, ordinary_attention(model))
            plain = torch.cat([_cached(model, text, None, [TRIED - 2, TRIED - 1]) for text in texts])
            if _distance_paged(model, heads, texts, plain) <= most:
                return True
            set_attention(model, ordinary_attention(model))
            off = distance(torch.cat([_in_steps(model, text) for text in texts]), plain)
    except Exception as error:  # whatever a method's own code raises
        raise UnsupportedError(" ".join(str(error).split())[:200]) from error
    if not off <= most:
        raise UnsupportedError(f"token by token its logits are off by {off:.2g} of their spread (allowed {most:g})")
    return False


def _distance_paged(
    model: PreTrainedModel, heads: Mapping[int, Heads], texts: Sequence[Sequence[int]], plain: torch.Tensor
) -> float:
    """Return how far off logits are in a flat batch: the first sequence in chunks, then both, then a token of each."""
    set_attention(model, NAME)
    count = -(-TRIED // PAGE)
    memory = Memory(heads, 2 * count, PAGE, model.dtype, model.device)
    pages = [list(reversed(range(count))), list(range(count, 2 * count))]
    half, last = TRIED // 2, TRIED - 1

    def part(which: int, start: int, stop: int) -> Part:
        return Part(texts[which][start:stop], start, pages[which])

    try:
        paged_logits(model, memory, [part(0, 0, half)], [])
        rows = [last - half - 1, 2 * last - half - 1]
        prompts = paged_logits(model, memory, [part(0, half, last), part(1, 0, last)], rows)
        answers = paged_logits(model, memory, [part(0, last, TRIED), part(1, last, TRIED)], [0, 1])
    except Exception:  # a part of the adapter that attends, or counts rows, in another way than the base
        return float("inf")
    return distance(torch.stack([prompts[0], answers[0], prompts[1], answers[1]]), plain)


def _in_steps(model: PreTrainedModel, text: Sequence[int]) -> torch.Tensor:
    """Return `[2, V]`, what follows the last two tokens, from a prompt in two chunks and a token after it."""
    cache, half = DynamicCache(config=model.config), TRIED // 2
    _cached(model, text[:half], cache, [])
    after_prompt = _cached(model, text[half:-1], cache, [TRIED - 2 - half])
    return torch.cat([after_prompt, _cached(model, text[-1:], cache, [0])])
