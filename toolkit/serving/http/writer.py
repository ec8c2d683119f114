"""How answers are written: whole, and as the events of a stream."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from fastapi import Query

from toolkit.routing.router import Choice
from toolkit.serving.http.errors import ApiError
from toolkit.serving.http.tools import Call
from toolkit.serving.request import FinishReason

Limit = Annotated[int, Query(ge=1, le=10000)]
"""How many entries of a list a page has."""


class Writer:
    """Writes the answers to one HTTP request.

    Args:
        chat: for `/v1/chat/completions`.
        model: that was asked for.
        request_id: of the HTTP request; the id of the answer is made of it.
        num_prompts: of the request; with several, each choice says itself what the router chose.
    """

    def __init__(self, chat: bool, model: str, request_id: str, num_prompts: int = 1) -> None:
        self.chat, self.model, self.num_prompts = chat, model, num_prompts
        self.id = ("chatcmpl-" if chat else "cmpl-") + request_id
        self.created = int(time.time())
        self._choices: dict[int, Choice] = {}

    def routed(self, index: int, choice: Choice) -> None:
        """Note what the router chose for an answer; if it is the same for all, the model's name is that expert's."""
        self._choices[index] = choice
        if self.num_prompts == 1:
            self.model = choice.expert

    def whole(self, choices: Sequence[dict[str, Any]], prompt_tokens: int, tokens: int) -> dict[str, Any]:
        """Return the body of an answer that is not streamed; `choices` are made by `choice`."""
        return self._head("", routed=True) | {"choices": list(choices), "usage": usage(prompt_tokens, tokens)}

    def choice(
        self, index: int, text: str, reason: FinishReason, calls: Sequence[Call] = (), logprobs: Any = None
    ) -> dict[str, Any]:
        """Return one answer of several."""
        if not self.chat:
            return self._choice(index, {"text": text}, reason, logprobs, routed=True)
        message: dict[str, Any] = {"role": "assistant", "content": text}
        if calls:
            message |= {"content": text or None, "tool_calls": [call.entry() for call in calls]}
        return self._choice(index, {"message": message}, self._reason(reason, bool(calls)), logprobs, routed=True)

    def chunk(
        self,
        index: int,
        text: str,
        reason: FinishReason | None,
        calls: Sequence[tuple[int, Call]] = (),
        logprobs: Any = None,
        *,
        first: bool = False,
        called: bool = False,
    ) -> dict[str, Any]:
        """Return one event of a stream.

        Args:
            index: of the answer.
            text: that is new.
            reason: why the answer ended, if it did.
            calls: that are new, each with its place among the calls of the answer.
            logprobs: of what is new.
            first: it is the first event of the answer.
            called: the answer has calls, new or not.
        """
        content: dict[str, Any] = {"text": text}
        if self.chat:
            delta: dict[str, Any] = {"role": "assistant"} if first else {}
            delta |= {"content": text} if text or first else {}
            delta |= {"tool_calls": [{"index": at} | call.entry() for at, call in calls]} if calls else {}
            content, reason_shown = {"delta": delta}, self._reason(reason, called)
        else:
            reason_shown = reason
        # The scores of many experts are long, so a stream has them once for each answer.
        choice = self._choice(index, content, reason_shown, logprobs, routed=first)
        return self._head(".chunk", routed=first) | {"choices": [choice]}

    def usage_chunk(self, prompt_tokens: int, tokens: int) -> dict[str, Any]:
        """Return the last event of a stream that counts tokens."""
        return self._head(".chunk") | {"choices": [], "usage": usage(prompt_tokens, tokens)}

    @staticmethod
    def _reason(reason: FinishReason | None, called: bool) -> str | None:
        return "tool_calls" if called and reason == "stop" else reason

    def _choice(
        self, index: int, content: dict[str, Any], reason: str | None, logprobs: Any, *, routed: bool
    ) -> dict[str, Any]:
        choice = {"index": index, **content, "finish_reason": reason, "logprobs": logprobs}
        if routed and self.num_prompts > 1 and index in self._choices:
            choice["routing"] = _routing(self._choices[index])
        return choice

    def _head(self, suffix: str, *, routed: bool = False) -> dict[str, Any]:
        kind = f"chat.completion{suffix}" if self.chat else "text_completion"
        head: dict[str, Any] = {"id": self.id, "object": kind, "created": self.created, "model": self.model}
        if routed and self.num_prompts == 1 and self._choices:
            head["routing"] = _routing(next(iter(self._choices.values())))
        return head


def _routing(choice: Choice) -> dict[str, Any]:
    return {
        "expert": choice.expert,
        "reason": choice.reason,
        "margin": choice.margin,
        "scores": choice.scores,
        "version": choice.version,
    }


def usage(prompt_tokens: int, tokens: int) -> dict[str, int]:
    """Return token counts."""
    return {"prompt_tokens": prompt_tokens, "completion_tokens": tokens, "total_tokens": prompt_tokens + tokens}


def model_list(names: Sequence[str], created: int) -> dict[str, Any]:
    """Return the body of `/v1/models`."""
    return {"object": "list", "data": [model_entry(name, created) for name in names]}


def page_of(entries: Sequence[Mapping[str, Any]], after: str | None, limit: int) -> dict[str, Any]:
    """Return a page of a list of things with ids: at most `limit` after the one with an id.

    Raises:
        ApiError: there is none with this id.
    """
    ids = [entry["id"] for entry in entries]
    if after is not None and after not in ids:
        raise ApiError(400, f"after: there is no {after!r} in the list")
    start = ids.index(after) + 1 if after is not None else 0
    return {"object": "list", "data": entries[start : start + limit], "has_more": len(entries) > start + limit}


def model_entry(name: str, created: int) -> dict[str, Any]:
    """Return the body of `/v1/models/NAME`."""
    return {"id": name, "object": "model", "created": created, "owned_by": "composition-toolkit"}
