"""A request as its submitter sees it, and the finished answer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from toolkit.errors import RequestError
from toolkit.routing.router import Choice
from toolkit.serving.request import FinishReason, Request, TokenLogprob
from toolkit.serving.text import TextStream


@dataclass(frozen=True)
class Answer:
    """A finished request.

    Attributes:
        text: the answer.
        tokens: its ids.
        model: what gave it: `base` or an adapter.
        finish_reason: why it ended.
        prompt_tokens: length of the prompt.
        choice: what the router chose, where it was asked.
        logprobs: of the answer's tokens, where the sampling asks for them.
        prompt_logprobs: of the prompt's tokens but the first, likewise.
    """

    text: str
    tokens: list[int]
    model: str
    finish_reason: FinishReason
    prompt_tokens: int
    choice: Choice | None = None
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)


@dataclass(eq=False)
class Ticket:
    """A request as its submitter sees it.

    Attributes:
        request: the engine's own.
        model: `base` or an adapter; `auto` until the router has chosen.
        user_text: what the router looks at.
        choice: what it chose.
    """

    request: Request
    model: str
    user_text: str
    stream: TextStream
    choice: Choice | None = None
    on_choice: Callable[[Choice], None] | None = field(default=None, repr=False)

    def answer(self) -> Answer:
        """Return the finished answer.

        Raises:
            RequestError: there is none, for the request ended with an error.
        """
        request = self.request
        assert request.finished is not None
        if request.finished == "error":
            raise RequestError(request.error)
        return Answer(
            request.text,
            request.output,
            self.model,
            request.finished,
            len(request.prompt),
            self.choice,
            request.logprobs,
            request.prompt_logprobs,
        )
