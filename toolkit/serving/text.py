"""Token ids to text as they come: whole characters only, and nothing of a stop text."""

from __future__ import annotations

from collections.abc import Sequence

from toolkit.data.tokenizer import Tokenizer

CONTEXT = 8
"""Last ids of a prompt that the first tokens of its answer are read after."""


class TextStream:
    """Turns the growing ids of one answer into text.

    Args:
        tokenizer: of the model.
        stops: texts at which the answer ends.
        prompt: ids that the answer follows; at the beginning of a text, some tokenizers drop a space that is part of
            the answer.

    Attributes:
        text: answer so far, without what may still become a stop text.
        stopped: whether a stop text was met.
        num_read: characters that were decoded so far, held back or not.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = (), prompt: Sequence[int] = ()) -> None:
        self.tokenizer = tokenizer
        self.stops = [stop for stop in stops if stop]
        self.text, self.stopped, self.num_read = "", False, 0
        self._held = ""
        self._begin = self._read = 0
        self._before = list(prompt[-CONTEXT:])
        self._known = self._text_of(self._before)
        if self._known.endswith("\ufffd"):
            self._before, self._known = [], ""  # the answer may complete the character, which is not the answer's

    def push(self, ids: Sequence[int]) -> str:
        """Take all ids so far; return the text that is certain now and was not before."""
        return self._release(self._decode(ids, final=False), final=False)

    def finish(self, ids: Sequence[int]) -> str:
        """Return what was held back, the answer being complete."""
        return self._release(self._decode(ids, final=True), final=True)

    def _decode(self, ids: Sequence[int], *, final: bool) -> str:
        # The ids before `_read` are decoded again as context: what a token reads as can depend on the one before.
        text = self._text_of([*self._before, *ids[self._begin :]])
        if not final and (len(text) <= len(self._known) or text.endswith("\ufffd")):
            return ""  # nothing that shows, or a character of which more bytes are to come
        new = text[len(self._known) :]
        self._begin, self._read, self._before = self._read, len(ids), []
        self._known = self._text_of(ids[self._begin :])
        self.num_read += len(new)
        return new

    def _text_of(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(list(ids), skip_special_tokens=True)

    def _release(self, new: str, *, final: bool) -> str:
        if self.stopped:
            return ""
        self._held += new
        for stop in self.stops:
            at = self._held.find(stop)
            if at >= 0:
                self._held, self.stopped, final = self._held[:at], True, True
        keep = 0 if final else max((_overlap(self._held, stop) for stop in self.stops), default=0)
        cut = len(self._held) - keep
        out, self._held = self._held[:cut], self._held[cut:]
        self.text += out
        return out


def _overlap(text: str, stop: str) -> int:
    """Return how many of the last characters of `text` could begin `stop`."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
