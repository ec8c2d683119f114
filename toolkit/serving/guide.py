"""The form that a request asks its answer to have."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from toolkit.errors import RequestError

GuideKind = Literal["json_schema", "regex", "grammar", "choice"]


@dataclass(frozen=True)
class Guide:
    """The form of an answer.

    Attributes:
        kind: of the text.
        text: a JSON schema; a regular expression that matches the whole answer, in the syntax of Rust's `regex`; a
            context-free grammar, in Lark's form or in llama.cpp's GBNF; or a JSON list of texts, one of which it is.
    """

    kind: GuideKind
    text: str

    @classmethod
    def of_schema(cls, schema: Any) -> Guide:
        """Return the guide of a JSON schema.

        Raises:
            RequestError: it is nested too deeply.
        """
        try:
            return cls("json_schema", json.dumps(schema))
        except RecursionError:
            raise RequestError("the json schema is nested too deeply") from None

    @classmethod
    def of_choice(cls, texts: Sequence[str]) -> Guide:
        """Return the guide of an answer that is one of several texts."""
        return cls("choice", json.dumps(list(texts)))
