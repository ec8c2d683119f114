"""What the bodies of requests are made of: strict objects, and the checks of their fields."""

from __future__ import annotations

import json
from typing import Any

from pydantic import AfterValidator, BaseModel, ConfigDict, model_validator
from pydantic_core import PydanticCustomError


class Body(BaseModel):
    """A JSON object: an unknown key is refused, never ignored; null is as good as leaving a key out."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        return {key: value for key, value in data.items() if value is not None or key not in cls.model_fields}


def only(*accepted: Any) -> AfterValidator:
    """Return the check of a field that is not served: clients may send the values that ask for nothing."""

    def check(value: Any) -> Any:
        # In Python, 0 is False and 1 is True; in JSON they are not.
        if any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in accepted):
            return value
        known = " or ".join(json.dumps(one) for one in (*accepted, None))
        raise PydanticCustomError(
            "unsupported",
            "{given} is not supported by this server, only {known}",
            {"given": shortened(value), "known": known},
        )

    return AfterValidator(check)


def shortened(value: Any) -> str:
    """Return a value as JSON, of at most 60 characters."""
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def several(value: Any) -> Any:
    """Make a list of prompts of one: a text or a list of token ids."""
    if isinstance(value, str) or (isinstance(value, list) and value and all(type(item) is int for item in value)):
        value = [value]
    if isinstance(value, list) and value and all(_is_prompt(item) for item in value):
        return value
    raise PydanticCustomError("prompt", "Input should be a text, a list of token ids, or a list of these")


def _is_prompt(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, list) and all(type(token) is int for token in value))
