"""The OpenAPI document of the interface, made of the schemas that requests are read with."""

from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from bitnet_numba.server.schemas import (
    Body,
    ChatBody,
    CompletionBody,
    DetokenizeBody,
    EmbeddingBody,
    ErrorBody,
    ResponseBody,
    TokenizeBody,
)

_POSTS: dict[str, tuple[type[Body], str]] = {
    "/v1/chat/completions": (ChatBody, "answers a conversation"),
    "/v1/completions": (CompletionBody, "continues texts"),
    "/v1/responses": (ResponseBody, "answers a text or a conversation"),
    "/v1/embeddings": (EmbeddingBody, "vectors of texts, of an embedding model"),
    "/tokenize": (TokenizeBody, "the token ids of a prompt"),
    "/detokenize": (DetokenizeBody, "the text of token ids"),
}
_GETS = {
    "/health": "whether answers are generated",
    "/v1/models": "the model",
    "/metrics": "for Prometheus",
}
_REF = "#/components/schemas/{model}"


def document(version: str) -> dict[str, Any]:
    """The document, as JSON has it."""
    kinds: list[type[BaseModel]] = [*(kind for kind, _ in _POSTS.values()), ErrorBody]
    _, definitions = models_json_schema([(kind, "validation") for kind in kinds], ref_template=_REF)
    error = _json_content("an error", "ErrorBody")
    paths: dict[str, Any] = {}
    for path, (kind, summary) in _POSTS.items():
        streams: dict[str, Any] = {"text/event-stream": {}} if "stream" in kind.model_fields else {}
        answer = {"description": "the answer", "content": {"application/json": {}, **streams}}
        body = {"required": True, "content": _json_content("", kind.__name__)["content"]}
        responses = {"200": answer, "4XX": error, "5XX": error}
        paths[path] = {"post": {"summary": summary, "requestBody": body, "responses": responses}}
    for path, summary in _GETS.items():
        kind_of = "text/plain" if path == "/metrics" else "application/json"
        answer = {"description": "the answer", "content": {kind_of: {}}}
        paths[path] = {"get": {"summary": summary, "responses": {"200": answer, "4XX": error, "5XX": error}}}
    return {
        "openapi": "3.1.0",
        "info": {"title": "bitnet_numba", "version": version},
        "paths": paths,
        "components": {
            "schemas": definitions["$defs"],
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{}, {"key": []}],
    }


def _json_content(description: str, schema: str) -> dict[str, Any]:
    content = {"application/json": {"schema": {"$ref": _REF.format(model=schema)}}}
    return {"description": description, "content": content}
