"""Log-probabilities as OpenAI's two endpoints write them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from toolkit.serving.http.token_texts import TokenTexts
from toolkit.serving.request import TokenLogprob
from toolkit.serving.text import TextStream

LEAST = -9999.0
"""What is written for the logarithm of zero, which JSON does not have; OpenAI writes it, too."""


def chat_logprobs(texts: TokenTexts, scores: Sequence[TokenLogprob]) -> dict[str, Any]:
    """Return the `logprobs` of a chat choice."""
    content = [
        _entry(texts, score.token, score.logprob) | {"top_logprobs": [_entry(texts, *one) for one in score.top]}
        for score in scores
    ]
    return {"content": content, "refusal": None}


def _entry(texts: TokenTexts, token: int, logprob: float) -> dict[str, Any]:
    return {"token": texts.text(token), "logprob": max(logprob, LEAST), "bytes": list(texts.bytes_of(token))}


def completion_logprobs(texts: TokenTexts, scores: Sequence[TokenLogprob], start: int = 0) -> dict[str, Any]:
    """Return the `logprobs` of a completion's choice.

    Args:
        texts: of tokens.
        scores: of its tokens.
        start: characters before the answer, where the prompt is a part of the text.
    """
    return {
        "tokens": [texts.name(score.token) for score in scores],
        "token_logprobs": [max(score.logprob, LEAST) for score in scores],
        "top_logprobs": [_named(texts, score) for score in scores],
        "text_offset": [start + score.offset for score in scores],
    }


def _named(texts: TokenTexts, score: TokenLogprob) -> dict[str, float]:
    """Return the alternatives by name, and the token itself."""
    pairs = [*score.top, (score.token, score.logprob)]
    return {texts.name(token): max(logprob, LEAST) for token, logprob in pairs}


def prompt_logprobs(texts: TokenTexts, prompt: Sequence[int], scores: Sequence[TokenLogprob]) -> dict[str, Any]:
    """Return the part of a completion's `logprobs` that is about its prompt; nothing is known of the first token."""
    offsets = _offsets(texts, prompt)
    placed = [
        TokenLogprob(score.token, score.logprob, score.top, offset)
        for score, offset in zip(scores, offsets[1:], strict=True)
    ]
    first = {"tokens": [texts.name(prompt[0])], "token_logprobs": [None], "top_logprobs": [None], "text_offset": [0]}
    return joined(first, completion_logprobs(texts, placed))


def joined(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """Put two parts of a completion's `logprobs` together."""
    return {key: [*one[key], *other[key]] for key in one}


def _offsets(texts: TokenTexts, ids: Sequence[int]) -> list[int]:
    """Return the characters before each token of a text."""
    stream, read, offsets = TextStream(texts.tokenizer), [], []
    for token in ids:
        offsets.append(stream.num_read)
        read.append(token)
        stream.push(read)
    return offsets
