"""What a request can ask with: a text, token ids, or chat messages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

from toolkit.data.tokenizer import Tokenizer
from toolkit.errors import RequestError

Prompt = str | Sequence[int] | Sequence[Mapping[str, str]]
"""A text, token ids, or chat messages."""


def encode_prompt(tokenizer: Tokenizer, prompt: Prompt, vocabulary: int | None = None) -> tuple[list[int], str]:
    """Turn a prompt into token ids, and into the text that a router looks at.

    Args:
        tokenizer: of the model.
        prompt: what was asked.
        vocabulary: rows of the model's input embedding, below which every id must be; `None` does not ask.

    Raises:
        RequestError: ids that the model does not have, text that is not Unicode, messages without a chat template
            or that the template refuses.
    """
    if isinstance(prompt, str):
        _check_text(prompt)
        ids, text = tokenizer.encode(prompt), prompt
    elif all(isinstance(token, int) for token in prompt):
        ids = [int(token) for token in cast(Sequence[int], prompt)]
        _check_ids(ids, vocabulary)  # before they are decoded, which some would break
        text = tokenizer.decode(ids, skip_special_tokens=True)
    elif all(isinstance(message, Mapping) for message in prompt):
        ids, text = _encode_chat(tokenizer, cast(Sequence[Mapping[str, Any]], prompt))
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


def _check_text(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise RequestError("the prompt is not valid Unicode") from None


def _encode_chat(tokenizer: Tokenizer, prompt: Sequence[Mapping[str, Any]]) -> tuple[list[int], str]:
    chat = [dict(message) for message in prompt]
    for value in (value for message in chat for value in message.values() if isinstance(value, str)):
        _check_text(value)
    if not tokenizer.chat_template:
        raise RequestError("the model has no chat template; ask for a completion of a text instead")
    try:
        ids = tokenizer.apply_chat_template(chat, tokenize=True, add_generation_prompt=True, return_dict=True)[
            "input_ids"
        ]
    except Exception as error:  # jinja raises what the template raises
        raise RequestError(f"the chat template refuses these messages ({error})") from None
    asked = [message["content"] for message in chat if message.get("role") == "user"]
    return ids, asked[-1] if asked else ""
