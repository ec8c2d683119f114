"""Chat messages and tools in OpenAI's form, and as chat templates take them."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from toolkit.serving.http.fields import Body, only, shortened


class Function(Body):
    """A function that a model may call."""

    name: Annotated[str, Field(min_length=1, max_length=64)]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: Annotated[Any, only(False)] = None


class Tool(Body):
    """A tool; functions are the only kind."""

    type: Literal["function"]
    function: Function


class CalledFunction(Body):
    """The function of a call that a model made."""

    name: str
    arguments: str


class ToolCall(Body):
    """A call that a model made, as the client sends it back."""

    id: str
    type: Literal["function"] = "function"
    function: CalledFunction


class TextPart(BaseModel):
    """A part of a content; its other keys are not looked at."""

    type: Literal["text"]
    text: str


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
            raise PydanticCustomError("unsupported", message, {"kind": shortened(kind)})
        if not isinstance(part.get("text"), str):
            raise PydanticCustomError("text_part", "a part of type text must have a text")
    return "".join(part["text"] for part in value)


Role = Literal["system", "user", "assistant", "tool"]


class Message(Body):
    """One chat message."""

    role: Annotated[Role, BeforeValidator(_role, Role | Literal["developer"])]
    content: Annotated[str, BeforeValidator(_joined, str | list[TextPart])] = ""
    name: str | None = None
    refusal: Annotated[Any, only()] = None
    tool_calls: list[ToolCall] = Field(default_factory=list)
    tool_call_id: str | None = None

    @model_validator(mode="after")
    def _content(self) -> Message:
        if "content" not in self.model_fields_set and not self.tool_calls:
            raise PydanticCustomError("content", "a message has a content, or calls of tools")
        if self.tool_calls and self.role != "assistant":
            raise PydanticCustomError("tool_calls", "only an assistant calls tools")
        if (self.tool_call_id is None) == (self.role == "tool"):
            raise PydanticCustomError("tool_call_id", "a message of a tool, and no other, has a tool_call_id")
        return self


def as_template_takes(message: Message) -> dict[str, Any]:
    """Return a message as chat templates expect it: the arguments of a call are an object, not its JSON."""
    shown = message.model_dump(include={"role", "content", "name", "tool_call_id"}, exclude_none=True)
    if message.tool_calls:
        shown["tool_calls"] = [
            {"id": call.id, "type": call.type, "function": {"name": call.function.name, "arguments": _arguments(call)}}
            for call in message.tool_calls
        ]
    return shown


def _arguments(call: ToolCall) -> Any:
    try:
        return json.loads(call.function.arguments)
    except (ValueError, RecursionError):
        return call.function.arguments  # what a model wrote need not be JSON; the template shows it as it is
