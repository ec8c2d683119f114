"""What the bodies of requests are made of: strict objects, and the checks of their fields."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, GetJsonSchemaHandler, model_validator
from pydantic.annotated_handlers import GetCoreSchemaHandler
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

_NULL = {"type": "null"}


class Body(BaseModel):
    """A JSON object: an unknown key is refused, never ignored; null is as good as leaving a key out.

    Types are JSON's own: the text "1" is no number. A number such as 2.0 is an integer, as JSON Schema has it.
    """

    model_config = ConfigDict(extra="forbid", protected_namespaces=(), strict=True)

    @model_validator(mode="before")
    @classmethod
    def _json_types(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        given = {key: value for key, value in data.items() if value is not None or key not in cls.model_fields}
        return {k: int(v) if isinstance(v, float) and v.is_integer() else v for k, v in given.items()}

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        """Say of every key that may be left out that it may be null."""
        found = handler(schema)
        own = handler.resolve_ref_schema(found)
        for name, field in own.get("properties", {}).items():
            nullable = field.get("type") == "null" or _NULL in field.get("anyOf", ())
            if name not in own.get("required", ()) and not nullable:
                default = {"default": field.pop("default")} if "default" in field else {}
                own["properties"][name] = {"anyOf": [field, _NULL], **default}
        return found


@dataclass(frozen=True)
class Only:
    """Takes no value but some; see `only`."""

    accepted: tuple[Any, ...]

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """Check after whatever else is checked."""
        return core_schema.no_info_after_validator_function(self.check, handler(source))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        """Name the values."""
        return {"enum": list(self.accepted)} if self.accepted else {"type": "null"}

    def check(self, value: Any) -> Any:
        """Return the value if it is one of them."""
        # In Python, 0 is False and 1 is True; in JSON they are not.
        if any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in self.accepted):
            return value
        known = " or ".join(json.dumps(one) for one in (*self.accepted, None))
        raise PydanticCustomError(
            "unsupported",
            "{given} is not supported by this server, only {known}",
            {"given": shortened(value), "known": known},
        )


def only(*accepted: Any) -> Only:
    """Return the check of a field that is not served: clients may send the values that ask for nothing."""
    return Only(accepted)


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


TokenIds = Annotated[list[int], Field(min_length=1)]
Prompts = Annotated[
    list[str | list[int]],
    BeforeValidator(several, str | TokenIds | Annotated[list[str | TokenIds], Field(min_length=1)]),
]
"""A text, token ids, or several of these."""
