"""The answers of one HTTP request as they grow: text, calls of tools, log-probabilities."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from toolkit.serving.http.bodies import ChatBody, CompletionBody
from toolkit.serving.http.calls import Call as EngineCall
from toolkit.serving.http.logprobs import chat_logprobs, completion_logprobs, joined, prompt_logprobs
from toolkit.serving.http.token_texts import TokenTexts
from toolkit.serving.http.tools import Call, ToolStream, call_reader
from toolkit.serving.http.writer import Writer
from toolkit.serving.request import Delta, FinishReason, TokenLogprob


@dataclass(frozen=True)
class Part:
    """What one step added to one answer, or several steps if nothing of the first showed.

    Attributes:
        index: of the answer.
        text: new content.
        calls: new calls of tools, each with its place among those of the answer.
        scores: of the tokens since the last part that showed.
        first: it is the first of the answer that shows.
        reason: why the answer ended, if it did.
        called: the answer has calls.
    """

    index: int
    text: str
    calls: list[tuple[int, Call]]
    scores: list[TokenLogprob]
    first: bool
    reason: FinishReason | None
    called: bool

    @property
    def shows(self) -> bool:
        """Whether a stream has an event for it."""
        return bool(self.text or self.calls or self.first or self.reason)


@dataclass
class _Growing:
    reader: ToolStream | None
    text: str = ""
    calls: list[Call] = field(default_factory=list)
    scores: list[TokenLogprob] = field(default_factory=list)
    held: list[TokenLogprob] = field(default_factory=list)
    reason: FinishReason | None = None
    shown: bool = False


class Answers:
    """Puts together what comes from the engine.

    Args:
        call: whose answers they are; it is submitted.
        writer: that is told what the router chose.
        texts: of single tokens.
    """

    def __init__(self, call: EngineCall, writer: Writer, texts: TokenTexts) -> None:
        self.call, self.writer, self.texts = call, writer, texts
        body = call.body
        tools = isinstance(body, ChatBody) and body.used_tools
        template = texts.tokenizer.get_chat_template() if tools else ""
        self._answers = [_Growing(call_reader(template) if tools else None) for _ in call.tickets]
        self._echoes = isinstance(body, CompletionBody) and body.echo

    async def parts(self) -> AsyncIterator[Part]:
        """Yield what the answers grow by, until all are finished."""
        async for index, item in self.call.items():
            if isinstance(item, Delta):
                yield self._grow(index, item)
            else:
                self.writer.routed(index, item)

    def _grow(self, index: int, delta: Delta) -> Part:
        answer = self._answers[index]
        text, calls = _read(answer.reader, delta)
        places = [(len(answer.calls) + at, call) for at, call in enumerate(calls)]
        answer.text, answer.calls, answer.reason = answer.text + text, answer.calls + calls, delta.finished
        answer.held += [delta.logprob] if delta.logprob else []
        part = Part(index, text, places, answer.held, not answer.shown, delta.finished, bool(answer.calls))
        if part.shows:
            answer.scores, answer.held, answer.shown = answer.scores + answer.held, [], True
        return part

    async def choice(self, index: int) -> dict[str, Any]:
        """Return a finished answer as the body of a response has it."""
        answer = self._answers[index]
        assert answer.reason is not None
        text = self.echo(index) + answer.text
        logprobs = await self._logprobs(index, answer.scores, first=True)
        return self.writer.choice(index, text, answer.reason, answer.calls, logprobs)

    def echo(self, index: int) -> str:
        """Return the prompt of an answer where it is asked for."""
        return self.call.tickets[index].user_text if self._echoes else ""

    async def logprobs(self, part: Part) -> dict[str, Any] | None:
        """Return the log-probabilities of a part of a stream; its first has those of the prompt."""
        return await self._logprobs(part.index, part.scores, first=part.first)

    async def _logprobs(self, index: int, scores: list[TokenLogprob], *, first: bool) -> dict[str, Any] | None:
        if self.call.body.alternatives is None:
            return None
        if self.writer.chat:
            return chat_logprobs(self.texts, scores)
        start = len(self.echo(index))
        found = completion_logprobs(self.texts, scores, start)
        if not (self._echoes and first):
            return found
        request = self.call.tickets[index].request
        # A long prompt takes a while, in which other answers go on.
        before = await asyncio.to_thread(prompt_logprobs, self.texts, request.prompt, request.prompt_logprobs)
        return joined(before, found)


def _read(reader: ToolStream | None, delta: Delta) -> tuple[str, list[Call]]:
    """Return the content and the calls of a delta."""
    if reader is None:
        return delta.text, []
    text, calls = reader.push(delta.text)
    if delta.finished:
        rest, more = reader.finish()
        return text + rest, calls + more
    return text, calls
