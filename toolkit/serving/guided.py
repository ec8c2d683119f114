"""Answers of a given form: a token that would break it cannot be chosen.

llguidance turns a JSON schema, a regular expression or a grammar into a parser of bytes, and every state of that into a
mask over the vocabulary. V: vocabulary.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from toolkit.errors import RequestError
from toolkit.serving.guide import Guide

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

MOST_KEPT = 128
"""Compiled guides that are kept for their next use."""

JSON_OPTIONS = {
    # A small model may write white space for ever; so much is enough to indent what people read.
    "whitespace_pattern": r"[ \n\r\t]{0,20}",
    # A schema can carry options of its own; none of them may drop what it demands.
    "lenient": False,
    "coerce_one_of": False,
}


class Guides:
    """The compiled guides of one model; any thread may use them.

    Args:
        tokenizer: of the model.
        num_logits: V, rows of the model's output head.
        ends: tokens that end an answer.
    """

    def __init__(self, tokenizer: Any, num_logits: int, ends: Collection[int]) -> None:
        self.tokenizer, self.num_logits = tokenizer, num_logits
        self.ends = sorted(end for end in ends if end < num_logits)
        self._vocabulary: LLTokenizer | None = None
        self._compiled: OrderedDict[Guide, LLMatcher] = OrderedDict()
        self._building, self._keeping = threading.Lock(), threading.Lock()

    def compile(self, guide: Guide) -> LLMatcher:
        """Return the parser of a guide in its first state; it is shared, so copy it before it moves.

        Raises:
            RequestError: the guide is wrong, or has what llguidance does not support, or llguidance is not installed.
        """
        with self._keeping:
            if guide in self._compiled:
                self._compiled.move_to_end(guide)
                return self._compiled[guide]
        # Outside of the lock, for this may take a while, in which others go on.
        compiled = self._compile(guide)
        with self._keeping:
            self._compiled[guide] = compiled
            while len(self._compiled) > MOST_KEPT:
                self._compiled.popitem(last=False)
        return compiled

    def start(self, guide: Guide) -> Matcher:
        """Return a matcher of one answer."""
        return Matcher(self.compile(guide).deep_copy(), self.num_logits)

    def _compile(self, guide: Guide) -> LLMatcher:
        vocabulary = self._known_vocabulary()
        from llguidance import LLMatcher, grammar_from

        try:
            if guide.kind == "json_schema":
                grammar = LLMatcher.grammar_from_json_schema(guide.text, overrides=JSON_OPTIONS)  # type: ignore[arg-type]
            else:
                grammar = grammar_from(guide.kind, guide.text)
        except ValueError as error:
            raise _refusal(guide, str(error)) from None
        matcher = LLMatcher(vocabulary, grammar, log_level=0)
        if not matcher.is_error():
            matcher.compute_bitmask()  # the first takes longest; the engine is to find it done
        if matcher.is_error():
            raise _refusal(guide, matcher.get_error())
        return matcher

    def _known_vocabulary(self) -> LLTokenizer:
        """Return the tokens as bytes, which are read when they are first needed."""
        with self._building:
            if self._vocabulary is None:
                self._vocabulary = self._read_vocabulary()
            return self._vocabulary

    def _read_vocabulary(self) -> LLTokenizer:
        try:
            from llguidance.hf import from_tokenizer
        except ModuleNotFoundError as error:
            raise RequestError(f"guided answers need {error.name}: pip install 'composition-toolkit[serve]'") from None
        if not self.ends:
            raise RequestError("the model has no end token, so no answer of a given form could end")
        try:
            # A tokenizer can have more tokens than the head has rows, and fewer.
            return from_tokenizer(self.tokenizer, max(self.num_logits, len(self.tokenizer)), self.ends)
        except ValueError as error:
            raise RequestError(f"this model's tokenizer cannot guide answers: {error}") from None


class Matcher:
    """How far one answer is in its form.

    Args:
        parser: in its first state, and nobody else's.
        num_logits: V.
    """

    def __init__(self, parser: LLMatcher, num_logits: int) -> None:
        self.parser, self.num_logits = parser, num_logits
        self._read = 0

    def masked(self, output: Sequence[int], logits_V: torch.Tensor) -> torch.Tensor:
        """Return logits `[V]` with -inf for every token that cannot come next.

        Args:
            output: all tokens of the answer so far.
            logits_V: of the next one.
        """
        self.parser.consume_tokens(list(output[self._read :]))
        self._read = len(output)
        if self.parser.is_error():
            return torch.full_like(logits_V, -torch.inf)
        return logits_V.masked_fill(~self._allowed().to(logits_V.device), -torch.inf)

    def _allowed(self) -> torch.Tensor:
        bits = np.frombuffer(self.parser.compute_bitmask(), np.uint8)
        allowed = np.unpackbits(bits, count=self.num_logits, bitorder="little")
        return torch.from_numpy(allowed.astype(np.bool_))

    @property
    def fault(self) -> str:
        """Why no token can come next."""
        return _one_line(self.parser.get_error()) or "no token of the model continues the form that was asked for"


def _refusal(guide: Guide, message: str) -> RequestError:
    return RequestError(f"the {guide.kind.replace('_', ' ')} cannot be followed: {_one_line(message)}")


def _one_line(message: str) -> str:
    return " ".join(message.split())[:300]
