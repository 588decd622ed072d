"""Answers of a given form over HTTP: they parse, and streams equal whole answers."""

import json
from typing import Any

import openai
import pydantic
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.server.helpers import Running

PATH = "/v1/chat/completions"
ASK = [{"role": "user", "content": "Name an animal."}]
BODY: dict[str, Any] = {"messages": ASK, "max_tokens": 150, "temperature": 1}


def closed(properties: dict[str, Any]) -> dict[str, Any]:
    """The schema of an object with these properties and no others."""
    return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}


LEAVES = st.sampled_from(
    [
        {"type": "boolean"},
        {"type": "integer", "minimum": 0, "maximum": 99},
        {"type": "string", "maxLength": 4},
        {"enum": [1, "a"]},
    ]
)
SCHEMAS = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        inner.map(lambda schema: {"type": "array", "items": schema, "maxItems": 2}),
        st.dictionaries(st.sampled_from("abc"), inner, max_size=2).map(closed),
    ),
    max_leaves=3,
)


def fits(value: Any, schema: dict[str, Any]) -> bool:
    """Whether a value is valid under one of these schemas."""
    if "enum" in schema:
        return value in schema["enum"]
    if schema["type"] == "array":
        return isinstance(value, list) and len(value) <= 2 and all(fits(item, schema["items"]) for item in value)
    if schema["type"] == "object":
        inner = schema["properties"]
        return isinstance(value, dict) and set(value) == set(inner) and all(fits(value[k], inner[k]) for k in inner)
    if schema["type"] == "string":
        return isinstance(value, str) and len(value) <= 4
    return isinstance(value, bool) if schema["type"] == "boolean" else type(value) is int and 0 <= value <= 99


def as_format(schema: Any, **more: Any) -> dict[str, Any]:
    """The field for a schema."""
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, **more}}


@settings(max_examples=8)
@given(schema=SCHEMAS.filter(lambda schema: schema.get("type") == "object"), seed=st.integers(0, 99))
def test_any_schema(server: Running, schema: dict[str, Any], seed: int) -> None:
    body = {**BODY, "seed": seed, "response_format": as_format(schema, strict=True)}
    choice = server.post(PATH, body).json()["choices"][0]
    content = choice["message"]["content"]
    events = server.events(PATH, body)[:-1]
    assert "".join(event["choices"][0]["delta"].get("content", "") for event in events) == content
    assert choice["finish_reason"] == "length" or fits(json.loads(content), schema)


def test_texts_and_responses_take_it_too(server: Running) -> None:
    schema = closed({"a": {"enum": [1, 2]}})
    text = server.post("/v1/completions", {"prompt": "Once", "response_format": as_format(schema)}).json()
    assert fits(json.loads(text["choices"][0]["text"]), schema) and text["choices"][0]["finish_reason"] == "stop"
    format = {"type": "json_schema", "name": "x", "schema": schema}
    answer = server.post("/v1/responses", {"input": "Once", "text": {"format": format}}).json()
    assert fits(json.loads(answer["output"][0]["content"][0]["text"]), schema) and answer["text"]["format"] == format
    free = {"input": "Once", "text": {"format": {"type": "json_object"}}, "max_output_tokens": 20}
    assert server.post("/v1/responses", free).json()["output"][0]["content"][0]["text"].startswith("{")


def test_openais_client_parses(client: openai.OpenAI) -> None:
    class Animal(pydantic.BaseModel):
        name: str = pydantic.Field(max_length=8)
        legs: int | None = pydantic.Field(ge=0, le=9)

    answer = client.chat.completions.parse(model="bitnet-demo", messages=ASK, response_format=Animal, seed=1)
    assert isinstance(answer.choices[0].message.parsed, Animal)
    reply = client.responses.parse(model="bitnet-demo", input="Name an animal.", text_format=Animal)
    assert isinstance(reply.output_parsed, Animal)


def test_a_form_is_one_line(server: Running) -> None:
    body = {**BODY, "response_format": {"type": "json_object"}, "seed": 1, "logprobs": True}
    content = server.post(PATH, body).json()["choices"][0]["message"]["content"]
    assert content.startswith("{") and "\n" not in content
    assert server.post(PATH, {**BODY, "response_format": {"type": "text"}}).status_code == 200


@pytest.mark.parametrize(
    "given, param",
    [
        ({"type": "grammar"}, "response_format.type"),
        ({}, "response_format.type"),
        ({"type": "json_schema"}, "response_format.json_schema.schema"),
        ({"type": "json_schema", "json_schema": {"name": "x"}}, "response_format.json_schema.schema"),
        (as_format({"type": "strnig"}), "response_format.json_schema.schema"),
        (as_format({"not": {}}, strict=True), "response_format.json_schema.schema"),
        (as_format({"description": "x" * 70_000}), "response_format.json_schema.schema"),
        (as_format(5), "response_format.json_schema.schema"),
    ],
)
def test_bad_schemas_are_refused_by_name(server: Running, given: Any, param: str) -> None:
    response = server.post(PATH, {**BODY, "response_format": given})
    assert response.status_code == 400 and response.json()["error"]["param"] == param


def test_a_schema_that_is_a_reference_to_itself_is_refused(server: Running) -> None:
    response = server.post(PATH, {**BODY, "response_format": as_format({"$ref": "#"})})
    error = response.json()["error"]
    assert response.status_code == 400 and error["message"] == "JSON schema: no text has this form", response.text
    assert error["code"] == "invalid_value" and error["param"]


ENDLESS: dict[str, Any] = {"type": "array", "items": {"$ref": "#"}, "minItems": 1}
ARGUMENTS = {"type": "object", "properties": {"a": {"$ref": "#/$defs/e"}}, "required": ["a"]} | {
    "$defs": {"e": {**ENDLESS, "items": {"$ref": "#/$defs/e"}}}
}
FUNCTION = {"name": "f", "parameters": ARGUMENTS}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "path, fields, param",
    [
        (PATH, {"messages": ASK, "response_format": as_format(ENDLESS)}, "response_format"),
        ("/v1/completions", {"prompt": "Once", "response_format": as_format(ENDLESS)}, "response_format"),
        (
            "/v1/responses",
            {"input": "x", "text": {"format": {"type": "json_schema", "schema": ENDLESS}}},
            "text.format",
        ),
        (PATH, {"messages": ASK, "tools": [{"type": "function", "function": FUNCTION}]}, "tools"),
        ("/v1/responses", {"input": "x", "tools": [{"type": "function", **FUNCTION}]}, "tools"),
    ],
)
def test_a_form_that_never_ends_is_a_fault_of_the_request(
    server: Running, path: str, fields: dict[str, Any], param: str, stream: bool
) -> None:
    """It may show when the answer has begun, which then ends with the error."""
    body = {**fields, "stream": stream} | ({"tool_choice": "required"} if "tools" in fields else {})
    response = server.post(path, body)
    text = response.text.splitlines()[-2].removeprefix("data: ") if response.status_code == 200 else response.text
    error = json.loads(text)
    error = error.get("error", error)  # an event of /v1/responses is the error itself
    assert response.status_code == 400 or stream, response.text
    assert "no end" in error["message"] and error["param"] == param and error["code"] == "invalid_value"


def test_what_cannot_be_enforced_is_refused_only_if_strict(server: Running) -> None:
    body = {**BODY, "response_format": as_format({"enum": ["a"], "not": {"const": "b"}})}
    assert server.post(PATH, body).json()["choices"][0]["message"]["content"] == '"a"'


def test_a_form_says_where_the_answer_ends(server: Running) -> None:
    body = {**BODY, "response_format": {"type": "json_object"}, "ignore_eos": True}
    assert server.post(PATH, body).json()["error"]["param"] == "ignore_eos"
