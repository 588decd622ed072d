"""The form that a request wants its answers to have, as the engine takes it."""

from dataclasses import replace

from bitnet_numba.engine.engine import Engine
from bitnet_numba.errors import RequestError
from bitnet_numba.grammar import Grammar
from bitnet_numba.sampling_params import SamplingParams
from bitnet_numba.server.errors import ApiError, from_request_error
from bitnet_numba.server.schemas import JsonSchema, ResponseFormat, TextFormat


def gives_form(format: ResponseFormat | TextFormat | None) -> bool:
    """Whether a format asks for more than text."""
    return format is not None and format.type != "text"


def read_format(format: ResponseFormat | None) -> Grammar | None:
    """The grammar of `response_format`; None: any text. Raises ApiError, naming the field, for a bad schema."""
    if format is None or format.type == "text":
        return None
    if format.type == "json_object":
        return Grammar.json()
    return read_schema(format.json_schema, "response_format.json_schema")


def read_schema(given: JsonSchema | None, field: str) -> Grammar:
    """The grammar of a schema. Raises ApiError, naming the field, if it is missing or bad."""
    if given is None or given.schema_ is None:
        raise ApiError(400, f"{field}.schema is missing", param=f"{field}.schema", code="invalid_value")
    try:
        return Grammar.json_schema(given.schema_, lenient=not given.strict)
    except RequestError as error:
        raise from_request_error(error, f"{field}.schema") from None


def constrained(engine: Engine, params: SamplingParams, grammar: Grammar | None, field: str) -> SamplingParams:
    """The parameters with a grammar. Raises ApiError if they do not go together, or if the model cannot follow it."""
    if grammar is None:
        return params
    if params.min_tokens or params.ignore_eos:
        name = "min_tokens" if params.min_tokens else "ignore_eos"
        raise ApiError(400, f"{name}: {field} says where the answer ends", param=name, code="invalid_value")
    try:
        engine.tokenizer.grammars.compile(grammar)
    except RequestError as error:
        raise from_request_error(error, field) from None
    return replace(params, grammar=grammar)
