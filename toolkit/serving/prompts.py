"""What a request can ask with: a text, token ids, or chat messages with or without tools."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from toolkit.data.tokenizer import Tokenizer
from toolkit.errors import RequestError


@dataclass(frozen=True)
class Chat:
    """Chat messages, and the tools that the model may call.

    Attributes:
        messages: as a chat template takes them.
        tools: functions in OpenAI's form, `{"type": "function", "function": {...}}`.
    """

    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[Mapping[str, Any]] = ()


Prompt = str | Sequence[int] | Sequence[Mapping[str, Any]] | Chat
"""A text, token ids, or chat messages."""


def encode_prompt(tokenizer: Tokenizer, prompt: Prompt, vocabulary: int | None = None) -> tuple[list[int], str]:
    """Turn a prompt into token ids, and into the text that a router looks at.

    Args:
        tokenizer: of the model.
        prompt: what was asked.
        vocabulary: rows of the model's input embedding, below which every id must be; `None` does not ask.

    Raises:
        RequestError: ids that the model does not have, text that is not Unicode, messages without a chat template
            or that the template refuses, tools that it does not show.
    """
    if isinstance(prompt, str):
        _check_text(prompt)
        ids, text = tokenizer.encode(prompt), prompt
    elif isinstance(prompt, Chat):
        ids, text = _encode_chat(tokenizer, prompt)
    elif all(isinstance(token, int) for token in prompt):
        ids = [int(token) for token in cast(Sequence[int], prompt)]
        _check_ids(ids, vocabulary)  # before they are decoded, which some would break
        text = tokenizer.decode(ids, skip_special_tokens=True)
    elif all(isinstance(message, Mapping) for message in prompt):
        ids, text = _encode_chat(tokenizer, Chat(cast(Sequence[Mapping[str, Any]], prompt)))
    else:
        raise RequestError("a prompt is a text, a list of token ids or a list of chat messages")
    # A tokenizer, too, can have tokens that the model does not: added ones, for which no embedding was made.
    _check_ids(ids, vocabulary)
    return ids, text


def _check_ids(ids: Sequence[int], vocabulary: int | None) -> None:
    if vocabulary is None:
        return
    wrong = next((token for token in ids if not 0 <= token < vocabulary), None)
    if wrong is not None:
        raise RequestError(f"the prompt has token id {wrong}, but the model's ids are 0 to {vocabulary - 1}")


def _check_text(value: Any) -> None:
    """Refuse text that is not Unicode, wherever in nested lists and mappings it is."""
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            raise RequestError("the prompt is not valid Unicode") from None
    elif isinstance(value, Mapping):
        for item in (*value.keys(), *value.values()):
            _check_text(item)
    elif isinstance(value, Sequence):
        for item in value:
            _check_text(item)


def _encode_chat(tokenizer: Tokenizer, chat: Chat) -> tuple[list[int], str]:
    messages = [dict(message) for message in chat.messages]
    _check_text(messages)
    _check_text(chat.tools)
    if not tokenizer.chat_template:
        raise RequestError("the model has no chat template; ask for a completion of a text instead")
    ids = _render(tokenizer, messages, chat.tools)
    if chat.tools and ids == _render(tokenizer, messages, ()):
        raise RequestError("the model's chat template does not show tools to the model")
    asked = [message["content"] for message in messages if message.get("role") == "user"]
    return ids, asked[-1] if asked else ""


def _render(
    tokenizer: Tokenizer, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]]
) -> list[int]:
    given = {"tools": [dict(tool) for tool in tools]} if tools else {}
    try:
        rendered = tokenizer.apply_chat_template(
            messages, tokenize=True, add_generation_prompt=True, return_dict=True, **given
        )
    except Exception as error:  # jinja raises what the template raises
        raise RequestError(f"the chat template refuses these messages ({error})") from None
    return rendered["input_ids"]
