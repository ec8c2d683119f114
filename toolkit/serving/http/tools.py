"""Calls of tools in the text of an answer, in the form that the model's chat template teaches."""

from __future__ import annotations

import json
import uuid
from dataclasses import dataclass, field
from typing import Any

OPENED, CLOSED = "<tool_call>", "</tool_call>"

BARE = '"name": function name, "parameters"'
"""How Llama 3's chat templates teach the form of a call."""


@dataclass(frozen=True)
class Call:
    """A call of a function.

    Attributes:
        name: of the function.
        arguments: their JSON.
        id: by which the client answers.
    """

    name: str
    arguments: str
    id: str = field(default_factory=lambda: f"call_{uuid.uuid4().hex[:24]}")

    def entry(self) -> dict[str, Any]:
        """Return the call as OpenAI writes it."""
        return {"id": self.id, "type": "function", "function": {"name": self.name, "arguments": self.arguments}}


def call_reader(template: str) -> ToolStream | None:
    """Return a reader of the calls that a chat template teaches, or `None` if it teaches none that is known here."""
    if OPENED in template:
        return TaggedCalls()
    if BARE in template:
        return BareCall()
    return None


class ToolStream:
    """Splits the text of an answer, as it comes, into content and calls."""

    def push(self, text: str) -> tuple[str, list[Call]]:
        """Take new text; return the content and the calls that are certain now and were not before."""
        raise NotImplementedError

    def finish(self) -> tuple[str, list[Call]]:
        """Return what was held back, the answer being complete; what is no call after all is content."""
        raise NotImplementedError


class TaggedCalls(ToolStream):
    """Calls in tags, as Hermes and Qwen write them: `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`."""

    def __init__(self) -> None:
        self._held, self._called = "", False

    def push(self, text: str) -> tuple[str, list[Call]]:
        """Take new text."""
        self._held += text
        content, calls = "", []
        while OPENED in self._held:
            lead = self._held.partition(OPENED)[0].rstrip()  # white space before a tag belongs to the tag
            content += self._plain(lead)
            self._held = self._held[len(lead) :]
            tagged, closed, rest = self._held.partition(CLOSED)
            if not closed:
                return content, calls
            call = read_call(tagged.partition(OPENED)[2], "arguments")
            if call:
                calls.append(call)
                self._called = True
            else:
                content += tagged + closed
            self._held = rest
        sure = self._held[: len(self._held) - self._begun()].rstrip()
        self._held = self._held[len(sure) :]
        return content + self._plain(sure), calls

    def _begun(self) -> int:
        """Return how many of the last characters could begin a tag."""
        return next((n for n in range(len(OPENED) - 1, 0, -1) if self._held.endswith(OPENED[:n])), 0)

    def _plain(self, text: str) -> str:
        return "" if self._called and not text.strip() else text

    def finish(self) -> tuple[str, list[Call]]:
        """Return what was held back; an answer that was cut inside of a call shows it as it is."""
        held, self._held = self._held, ""
        return self._plain(held), []


class BareCall(ToolStream):
    """An answer that is one call and nothing else, as Llama 3 writes it: `{"name": ..., "parameters": {...}}`."""

    def __init__(self) -> None:
        self._held, self._is_text = "", False

    def push(self, text: str) -> tuple[str, list[Call]]:
        """Take new text; what begins with a brace is held until the answer is complete."""
        self._held += text
        begun = self._held.lstrip()
        self._is_text = self._is_text or bool(begun and not begun.startswith("{"))
        if not self._is_text:
            return "", []
        content, self._held = self._held, ""
        return content, []

    def finish(self) -> tuple[str, list[Call]]:
        """Return the call, or the text that looked like one."""
        call = read_call(self._held, "parameters")
        content, self._held = "" if call else self._held, ""
        return content, [call] if call else []


def read_call(text: str, key: str) -> Call | None:
    """Return the call that a JSON object describes, its arguments under `key`; `None` if it does not."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(found, dict) or not isinstance(found.get("name"), str):
        return None
    arguments = found.get(key, {})
    if not isinstance(arguments, dict):
        return None
    return Call(found["name"], json.dumps(arguments, ensure_ascii=False))
