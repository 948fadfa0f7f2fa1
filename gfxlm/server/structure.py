"""What a request can say about the form of its text: OpenAI's fields, vLLM's and llama.cpp's."""

import json
from typing import Any, Literal

from pydantic import Field, model_validator

from gfxlm.engine.grammar import Grammar
from gfxlm.server.errors import invalid
from gfxlm.server.fields import Body

Schema = dict[str, Any] | bool


class JsonSchemaFormat(Body):
    """A named schema. It is enforced whether it is `strict` or not."""

    name: str | None = None
    description: str | None = Field(None, description="Ignored.")
    schema_: Schema | None = Field(None, alias="schema")
    strict: bool | None = None


class ResponseFormat(Body):
    """OpenAI's."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None
    schema_: Schema | None = Field(None, alias="schema", description="llama.cpp's place for the schema.")

    def grammar(self, param: str = "response_format") -> Grammar | None:
        """What it asks for. ApiError 400 where the schema is missing; `param` names the field that holds all of it."""
        schema = self.json_schema.schema_ if self.json_schema is not None else self.schema_
        if self.type == "text":
            return None
        if schema is not None:
            return Grammar("json_schema", json.dumps(schema))
        if self.type == "json_object":
            return Grammar("json_object")
        raise invalid(f"{param}: type json_schema has no schema", param=param)


class StructuredOutputs(Body):
    """vLLM's: one of these."""

    json_: Schema | str | None = Field(None, alias="json")
    json_object: bool | None = None
    regex: str | None = None
    choice: list[str] | None = Field(None, min_length=1)
    grammar: str | None = Field(None, description="In Lark, or in GBNF.")

    @model_validator(mode="after")
    def _one(self) -> "StructuredOutputs":
        given = [name for name in type(self).model_fields if getattr(self, name) not in (None, False)]
        if len(given) != 1:
            raise ValueError("structured_outputs: must have one of json, json_object, regex, choice and grammar")
        return self

    def constraint(self) -> Grammar:
        """What it asks for. ApiError 400 for a grammar that is none."""
        if self.json_ is not None:
            return Grammar("json_schema", self.json_ if isinstance(self.json_, str) else json.dumps(self.json_))
        if self.regex is not None:
            return Grammar("regex", self.regex)
        if self.choice is not None:
            return Grammar.choice(self.choice)
        return Grammar("json_object") if self.grammar is None else _lark(self.grammar, "structured_outputs")


class StructureFields(Body):
    """The form of the text; no more than one of these."""

    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    json_schema: Schema | None = Field(None, description="llama.cpp's response_format.")
    grammar: str | None = Field(None, description="In GBNF, as llama.cpp has it, or in Lark.")

    def structured_by(self) -> str | None:
        """The one of these fields that was sent. ApiError 400 for several."""
        given = [name for name in StructureFields.model_fields if getattr(self, name) is not None]
        if len(given) > 1:
            raise invalid(f"{given[1]}: does not go together with {given[0]}", param=given[1])
        return given[0] if given else None

    def structure(self) -> Grammar | None:
        """What the text has to look like. ApiError 400 for what cannot be."""
        self.structured_by()
        if self.response_format is not None:
            return self.response_format.grammar()
        if self.structured_outputs is not None:
            return self.structured_outputs.constraint()
        if self.json_schema is not None:
            return Grammar("json_schema", json.dumps(self.json_schema))
        return None if self.grammar is None else _lark(self.grammar, "grammar")


def _lark(text: str, param: str) -> Grammar:
    from llguidance.gbnf_to_lark import any_to_lark

    try:
        return Grammar("lark", any_to_lark(text))
    except Exception as error:  # of its own parser, of many types
        raise invalid(f"{param}: not GBNF: {' '.join(str(error).split())}", param=param) from error
