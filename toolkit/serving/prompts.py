"""What a request can ask with: a text, token ids, or chat messages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

from toolkit.data.tokenizer import Tokenizer
from toolkit.errors import RequestError

Prompt = str | Sequence[int] | Sequence[Mapping[str, str]]
"""A text, token ids, or chat messages."""


def encode_prompt(tokenizer: Tokenizer, prompt: Prompt) -> tuple[list[int], str]:
    """Turn a prompt into token ids, and into the text that a router looks at.

    Raises:
        RequestError: messages without a chat template, or that the template refuses.
    """
    if isinstance(prompt, str):
        return tokenizer.encode(prompt), prompt
    if all(isinstance(token, int) for token in prompt):
        ids = [int(token) for token in cast(Sequence[int], prompt)]
        return ids, tokenizer.decode(ids, skip_special_tokens=True)
    chat = [dict(message) for message in cast(Sequence[Mapping[str, Any]], prompt)]
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
