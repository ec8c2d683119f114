"""How a request names the form of its answer: OpenAI's `response_format`, and vLLM's fields."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from toolkit.serving.guide import Guide
from toolkit.serving.http.fields import Body

Schema = dict[str, Any]
Choices = Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1, max_length=10_000)]


class JsonSchema(Body):
    """A named JSON schema, as OpenAI wraps one."""

    name: Annotated[str, Field(min_length=1, max_length=64)]
    description: str | None = None
    schema_: Annotated[Schema, Field(alias="schema")]
    strict: bool | None = None


class ResponseFormat(Body):
    """OpenAI's `response_format`."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _schema(self) -> Self:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise PydanticCustomError("json_schema", "a response_format of type json_schema, and no other, has one")
        return self

    @property
    def guide(self) -> Guide | None:
        """The form that it asks for."""
        if self.json_schema is not None:
            return Guide.of_schema(self.json_schema.schema_)
        return Guide.of_schema({"type": "object"}) if self.type == "json_object" else None


class StructuredOutputs(Body):
    """VLLM's `structured_outputs`."""

    json_: Annotated[Schema | None, Field(alias="json")] = None
    regex: str | None = None
    grammar: str | None = None
    choice: Choices | None = None

    @property
    def guides(self) -> list[Guide]:
        """Every form that it asks for."""
        return guides_of(self.json_, self.regex, self.grammar, self.choice)


class GuidedBody(Body):
    """The fields of a request that name the form of its answer; at most one of them may."""

    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: Schema | None = None
    guided_regex: str | None = None
    guided_grammar: str | None = None
    guided_choice: Choices | None = None

    @model_validator(mode="after")
    def _one_form(self) -> Self:
        if len(self._guides) > 1:
            raise PydanticCustomError("guides", "an answer has one form, and the request asks for several")
        return self

    @property
    def _guides(self) -> list[Guide]:
        found = guides_of(self.guided_json, self.guided_regex, self.guided_grammar, self.guided_choice)
        found += self.structured_outputs.guides if self.structured_outputs else []
        named = self.response_format.guide if self.response_format else None
        return [*found, *([named] if named else [])]

    @property
    def guide(self) -> Guide | None:
        """The form of the answer."""
        return next(iter(self._guides), None)


def guides_of(schema: Schema | None, regex: str | None, grammar: str | None, choice: list[str] | None) -> list[Guide]:
    """Return the guides of those that are given."""
    found = [Guide.of_schema(schema)] if schema is not None else []
    found += [Guide("regex", regex)] if regex is not None else []
    found += [Guide("grammar", grammar)] if grammar is not None else []
    return found + ([Guide.of_choice(choice)] if choice is not None else [])
