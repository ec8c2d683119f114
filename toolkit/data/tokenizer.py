"""What the toolkit needs of a tokenizer; those of transformers have it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol


class Tokenizer(Protocol):
    """A transformers tokenizer, as far as it is used here."""

    chat_template: Any
    pad_token_id: int | None
    eos_token_id: int | None
    pad_token: Any
    eos_token: Any
    model_max_length: int
    is_fast: bool
    special_tokens_map: Mapping[str, Any]
    added_tokens_decoder: Mapping[int, Any]

    def __call__(self, text: str, **options: Any) -> Any:
        """Return the ids of a text and what else the options ask for."""
        ...

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Return the ids of a text."""
        ...

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """Return the text of ids."""
        ...

    def convert_ids_to_tokens(self, ids: int) -> str | None:
        """Return the vocabulary's own entry of an id."""
        ...

    def apply_chat_template(self, conversation: Sequence[Mapping[str, Any]], **options: Any) -> Any:
        """Render chat messages."""
        ...

    def get_chat_template(self) -> str:
        """Return the chat template, the default one of several."""
        ...

    def save_pretrained(self, folder: Any) -> Any:
        """Write the tokenizer's files."""
        ...
