"""The bodies of OpenAI's HTTP API: what is accepted, and how answers are written."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field
from typing_extensions import override

from toolkit.routing.router import Choice
from toolkit.serving.prompts import Prompt
from toolkit.serving.request import FinishReason, Sampling


class StreamOptions(BaseModel):
    """What a stream carries besides text."""

    model_config = ConfigDict(extra="forbid")

    include_usage: bool = False


class _Body(BaseModel):
    """What completions and chat completions share; a field that is not served is refused, never ignored."""

    model_config = ConfigDict(extra="forbid")

    model: str
    temperature: Annotated[float, Field(ge=0, le=2)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=0)] = 0
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] = Field(default_factory=list)
    ignore_eos: bool = False
    n: Literal[1] = 1
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: str | None = None

    @property
    def limit(self) -> int | None:
        """Most tokens to generate; `None` for as many as fit."""
        raise NotImplementedError

    def sampling(self) -> Sampling:
        """Return the engine's form of the sampling fields."""
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return Sampling(
            max_tokens=self.limit,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            seed=self.seed,
            stop=stop,
            stop_token_ids=self.stop_token_ids,
            ignore_eos=self.ignore_eos,
        )

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with token counts."""
        return bool(self.stream_options and self.stream_options.include_usage)


class CompletionBody(_Body):
    """Body of `/v1/completions`."""

    prompt: str | list[int]
    max_tokens: Annotated[int, Field(ge=1)] = 16

    @property
    def asked(self) -> Prompt:
        """The prompt."""
        return self.prompt

    @property
    @override
    def limit(self) -> int | None:
        return self.max_tokens


class Message(BaseModel):
    """One chat message."""

    model_config = ConfigDict(extra="forbid")

    role: Literal["system", "user", "assistant"]
    content: str


class ChatBody(_Body):
    """Body of `/v1/chat/completions`."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None

    @property
    def asked(self) -> Prompt:
        """The messages."""
        return [message.model_dump() for message in self.messages]

    @property
    @override
    def limit(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens


class Writer:
    """Writes the answer to one request.

    Args:
        chat: for `/v1/chat/completions`.
        model: that was asked for.
    """

    def __init__(self, chat: bool, model: str) -> None:
        self.chat, self.model = chat, model
        self.id = ("chatcmpl-" if chat else "cmpl-") + uuid.uuid4().hex
        self.created = int(time.time())
        self.choice: Choice | None = None

    def routed(self, choice: Choice) -> None:
        """Note what the router chose; answers name the expert from here on."""
        self.choice, self.model = choice, choice.expert

    def whole(self, text: str, reason: FinishReason, prompt_tokens: int, tokens: int) -> dict[str, Any]:
        """Return the body of an answer that is not streamed."""
        content: dict[str, Any] = {"message": {"role": "assistant", "content": text}} if self.chat else {"text": text}
        choice = {"index": 0, **content, "finish_reason": reason, "logprobs": None}
        return self._head("") | {"choices": [choice], "usage": usage(prompt_tokens, tokens)}

    def chunk(self, text: str, reason: FinishReason | None, *, first: bool = False) -> dict[str, Any]:
        """Return one event of a stream."""
        content: dict[str, Any] = {"text": text}
        if self.chat:
            content = {"delta": ({"role": "assistant"} if first else {}) | ({"content": text} if text or first else {})}
        choice = {"index": 0, **content, "finish_reason": reason, "logprobs": None}
        return self._head(".chunk") | {"choices": [choice]}

    def usage_chunk(self, prompt_tokens: int, tokens: int) -> dict[str, Any]:
        """Return the last event of a stream that counts tokens."""
        return self._head(".chunk") | {"choices": [], "usage": usage(prompt_tokens, tokens)}

    def _head(self, suffix: str) -> dict[str, Any]:
        kind = f"chat.completion{suffix}" if self.chat else "text_completion"
        head: dict[str, Any] = {"id": self.id, "object": kind, "created": self.created, "model": self.model}
        if self.choice:
            head["routing"] = {"expert": self.choice.expert, "scores": self.choice.scores}
        return head


def usage(prompt_tokens: int, tokens: int) -> dict[str, int]:
    """Return token counts."""
    return {"prompt_tokens": prompt_tokens, "completion_tokens": tokens, "total_tokens": prompt_tokens + tokens}


def model_list(names: Sequence[str], created: int) -> dict[str, Any]:
    """Return the body of `/v1/models`."""
    data = [{"id": name, "object": "model", "created": created, "owned_by": "composition-toolkit"} for name in names]
    return {"object": "list", "data": data}


def error_body(message: str, kind: str, code: str | None = None, param: str | None = None) -> dict[str, Any]:
    """Return an error as OpenAI's clients expect it."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}
