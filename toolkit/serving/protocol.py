"""The bodies of OpenAI's HTTP API: what is accepted, and how answers are written."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError
from typing_extensions import override

from toolkit.routing.router import Choice
from toolkit.serving.prompts import Prompt
from toolkit.serving.request import SEEDS, FinishReason, Sampling


def _only(*accepted: Any) -> AfterValidator:
    """Return the check of a field that is not served: clients may send the values that ask for nothing."""

    def check(value: Any) -> Any:
        # In Python, 0 is False and 1 is True; in JSON they are not.
        if any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in accepted):
            return value
        known = " or ".join(json.dumps(one) for one in (*accepted, None))
        raise PydanticCustomError(
            "unsupported",
            "{given} is not supported by this server, only {known}",
            {"given": _short(value), "known": known},
        )

    return AfterValidator(check)


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


class _Object(BaseModel):
    """A JSON object: an unknown key is refused, never ignored; null is as good as leaving a key out."""

    model_config = ConfigDict(extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        return {key: value for key, value in data.items() if value is not None or key not in cls.model_fields}


class StreamOptions(_Object):
    """What a stream carries besides text."""

    include_usage: bool = False
    include_obfuscation: Annotated[Any, _only(False)] = None


class _Body(_Object):
    """What completions and chat completions share."""

    model: str
    temperature: Annotated[float, Field(ge=0, le=2)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=0)] = 0
    seed: Annotated[int, Field(ge=SEEDS[0], le=SEEDS[1])] | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] = Field(default_factory=list)
    ignore_eos: bool = False
    n: Literal[1] = 1
    stream: bool = False
    stream_options: StreamOptions | None = None
    # These describe a request and change no answer.
    user: str | None = None
    metadata: dict[str, Any] | None = None
    # These are not served.
    presence_penalty: Annotated[Any, _only(0)] = None
    frequency_penalty: Annotated[Any, _only(0)] = None
    logit_bias: Annotated[Any, _only({})] = None
    logprobs: Annotated[Any, _only(False)] = None
    store: Annotated[Any, _only(False)] = None
    service_tier: Annotated[Any, _only("auto", "default")] = None

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


def _one_prompt(value: Any) -> Any:
    """Unwrap a list of one prompt."""
    if isinstance(value, list) and value and all(isinstance(item, str | list) for item in value):
        if len(value) > 1:
            raise PydanticCustomError("prompts", "one prompt per request, got {count}", {"count": len(value)})
        value = value[0]
    if isinstance(value, str) or (isinstance(value, list) and all(type(token) is int for token in value)):
        return value
    raise PydanticCustomError("prompt", "Input should be a text or a list of token ids")


class CompletionBody(_Body):
    """Body of `/v1/completions`."""

    prompt: Annotated[str | list[int], BeforeValidator(_one_prompt)]
    max_tokens: Annotated[int, Field(ge=1)] = 16
    best_of: Annotated[Any, _only(1)] = None
    echo: Annotated[Any, _only(False)] = None
    suffix: Annotated[Any, _only("")] = None

    @property
    def asked(self) -> Prompt:
        """The prompt."""
        return self.prompt

    @property
    @override
    def limit(self) -> int | None:
        return self.max_tokens


def _role(value: Any) -> Any:
    return "system" if value == "developer" else value


def _joined(value: Any) -> Any:
    """Join the parts of a content that comes in parts."""
    if not isinstance(value, list):
        return value
    for part in value:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text":
            message = "a part of type {kind} is not supported by this server, only text"
            raise PydanticCustomError("unsupported", message, {"kind": _short(kind)})
        if not isinstance(part.get("text"), str):
            raise PydanticCustomError("text_part", "a part of type text must have a text")
    return "".join(part["text"] for part in value)


class Message(_Object):
    """One chat message."""

    role: Annotated[Literal["system", "user", "assistant"], BeforeValidator(_role)]
    content: Annotated[str, BeforeValidator(_joined)]
    name: str | None = None
    refusal: Annotated[Any, _only()] = None
    tool_calls: Annotated[Any, _only([])] = None


class ChatBody(_Body):
    """Body of `/v1/chat/completions`."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    parallel_tool_calls: bool | None = None
    top_logprobs: Annotated[Any, _only()] = None
    response_format: Annotated[Any, _only({"type": "text"})] = None
    tools: Annotated[Any, _only([])] = None
    tool_choice: Annotated[Any, _only("none", "auto")] = None

    @property
    def asked(self) -> Prompt:
        """The messages, as a chat template takes them."""
        return [message.model_dump(include={"role", "content", "name"}, exclude_none=True) for message in self.messages]

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
    return {"object": "list", "data": [model_entry(name, created) for name in names]}


def model_entry(name: str, created: int) -> dict[str, Any]:
    """Return the body of `/v1/models/NAME`."""
    return {"id": name, "object": "model", "created": created, "owned_by": "composition-toolkit"}


def error_body(message: str, kind: str, code: str | None = None, param: str | None = None) -> dict[str, Any]:
    """Return an error as OpenAI's clients expect it; what is not Unicode in it is escaped."""
    message, param = _unicode(message), _unicode(param) if param else None
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def _unicode(text: str) -> str:
    """Escape lone surrogates, which JSON can carry in but which cannot be written out."""
    return text.encode(errors="backslashreplace").decode()
