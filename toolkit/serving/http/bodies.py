"""The bodies of completions and chat completions: what is accepted, and what the engine makes of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator
from pydantic_core import PydanticCustomError
from typing_extensions import override

from toolkit.serving.http.fields import Body, Prompts, only
from toolkit.serving.http.guides import GuidedBody
from toolkit.serving.http.messages import Message, Tool, as_template_takes
from toolkit.serving.mix import BASE, MOST_PARTS, MOST_WEIGHT, show_model
from toolkit.serving.prompts import Chat, Prompt
from toolkit.serving.request import MOST_BIAS, MOST_LOGPROBS, MOST_PENALTY, SEEDS, Sampling

MOST_ANSWERS = 128
"""Answers that one request can ask for, over all of its prompts."""

Penalty = Annotated[float, Field(ge=-MOST_PENALTY, le=MOST_PENALTY)]
Bias = Annotated[float, Field(ge=-MOST_BIAS, le=MOST_BIAS)]


def _number(value: Any) -> Any:
    """Read a key of an object as the number that it stands for."""
    return int(value) if isinstance(value, str) and value.isascii() and value.isdigit() else value


TokenId = Annotated[int, BeforeValidator(_number), Field(ge=0)]
Alternatives = Annotated[int, Field(ge=0, le=MOST_LOGPROBS)]


class StreamOptions(Body):
    """What a stream carries besides text."""

    include_usage: bool = False
    include_obfuscation: Annotated[Any, only(False)] = None


class Part(Body):
    """An adapter of a composition."""

    name: Annotated[str, Field(min_length=1, pattern=r"^[^+:]*$")]
    weight: Annotated[float, Field(ge=-MOST_WEIGHT, le=MOST_WEIGHT)] = 1.0


class GenerateBody(GuidedBody):
    """What completions and chat completions share."""

    model: str
    adapters: Annotated[list[Part], Field(max_length=MOST_PARTS)] = Field(default_factory=list)
    priority: Annotated[int, Field(ge=-100, le=100)] = 0
    timeout: Annotated[float, Field(gt=0, le=86400)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=0)] = 0
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    presence_penalty: Penalty = 0.0
    frequency_penalty: Penalty = 0.0
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] = 1.0
    logit_bias: Annotated[dict[TokenId, Bias], Field(json_schema_extra={"propertyNames": {"pattern": "^[0-9]+$"}})] = (
        Field(default_factory=dict)
    )
    seed: Annotated[int, Field(ge=SEEDS[0], le=SEEDS[1])] | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] = Field(default_factory=list)
    ignore_eos: bool = False
    n: Annotated[int, Field(ge=1, le=MOST_ANSWERS)] = 1
    stream: bool = False
    stream_options: StreamOptions | None = None
    # These describe a request and change no answer.
    user: str | None = None
    metadata: dict[str, Any] | None = None
    # These are not served.
    store: Annotated[Any, only(False)] = None
    service_tier: Annotated[Any, only("auto", "default")] = None

    @property
    def limit(self) -> int | None:
        """Most tokens to generate; `None` for as many as fit."""
        raise NotImplementedError

    @property
    def alternatives(self) -> int | None:
        """How many likely tokens to name beside each of an answer; `None` names no log-probabilities at all."""
        raise NotImplementedError

    @property
    def prompts(self) -> list[Prompt]:
        """What is asked; each gets `n` answers."""
        raise NotImplementedError

    @model_validator(mode="after")
    def _composed(self) -> Self:
        if self.adapters and self.model != BASE:
            message = "adapters are put on the base, so the model must be {base}, not {model}"
            raise PydanticCustomError("adapters", message, {"base": BASE, "model": self.model})
        return self

    @property
    def asked_model(self) -> str:
        """What is to answer, in the form of one name."""
        return show_model([(part.name, part.weight) for part in self.adapters]) if self.adapters else self.model

    def sampling(self, index: int) -> Sampling:
        """Return the engine's form of the sampling fields, for one of the `n` answers: each has a seed of its own."""
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        seed = None if self.seed is None else (self.seed + index) % 2**64
        return Sampling(
            max_tokens=self.limit,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            repetition_penalty=self.repetition_penalty,
            logit_bias=self.logit_bias,
            seed=seed,
            stop=stop,
            stop_token_ids=self.stop_token_ids,
            ignore_eos=self.ignore_eos,
            logprobs=self.alternatives,
            guide=self.guide,
        )

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with token counts."""
        return bool(self.stream_options and self.stream_options.include_usage)


def _false_is_none(value: Any) -> Any:
    if value is True:
        raise PydanticCustomError("logprobs", "Input should be a number of alternatives")
    return None if value is False else value


class CompletionBody(GenerateBody):
    """Body of `/v1/completions`."""

    prompt: Prompts
    max_tokens: Annotated[int, Field(ge=0)] = 16
    echo: bool = False
    logprobs: Annotated[Alternatives | None, BeforeValidator(_false_is_none, Alternatives | Literal[False] | None)] = (
        None
    )
    best_of: Annotated[Any, only(1)] = None
    suffix: Annotated[Any, only("")] = None

    @model_validator(mode="after")
    def _counts(self) -> CompletionBody:
        if len(self.prompt) * self.n > MOST_ANSWERS:
            raise PydanticCustomError(
                "answers",
                "{count} prompts with n = {n} are more than {most} answers",
                {"count": len(self.prompt), "n": self.n, "most": MOST_ANSWERS},
            )
        if self.max_tokens == 0 and not self.echo:
            raise PydanticCustomError("max_tokens", "max_tokens is 0, which only echo has a use for")
        return self

    @property
    @override
    def prompts(self) -> list[Prompt]:
        return list(self.prompt)

    @property
    @override
    def limit(self) -> int | None:
        return self.max_tokens

    @property
    @override
    def alternatives(self) -> int | None:
        return self.logprobs

    @override
    def sampling(self, index: int) -> Sampling:
        scored = self.logprobs if self.echo else None
        return Sampling(**{**vars(super().sampling(index)), "prompt_logprobs": scored})


class ChatBody(GenerateBody):
    """Body of `/v1/chat/completions`."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool = False
    top_logprobs: Alternatives = 0
    tools: list[Tool] = Field(default_factory=list)
    tool_choice: Annotated[Any, only("none", "auto")] = None
    parallel_tool_calls: bool | None = None

    @model_validator(mode="after")
    def _logprobs(self) -> ChatBody:
        if self.top_logprobs and not self.logprobs:
            raise PydanticCustomError("top_logprobs", "top_logprobs needs logprobs to be true")
        if self.guide is not None and self.used_tools:
            raise PydanticCustomError("guide", "an answer that may call tools cannot have a form")
        return self

    @property
    def used_tools(self) -> list[Mapping[str, Any]]:
        """The tools that the model may call."""
        return [] if self.tool_choice == "none" else [tool.model_dump(exclude_none=True) for tool in self.tools]

    @property
    @override
    def prompts(self) -> list[Prompt]:
        return [Chat([as_template_takes(message) for message in self.messages], self.used_tools)]

    @property
    @override
    def limit(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    @override
    def alternatives(self) -> int | None:
        return self.top_logprobs if self.logprobs else None
