"""Requests as pydantic reads them. Unknown fields are ignored, and null is the same as an absent field.

Fields that this server knows but does not support are listed with the values that change nothing; anything else in them
is refused by name (`refuse_unsupported`).
"""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt, StrictStr, WithJsonSchema

from bitnet_numba.errors import printable
from bitnet_numba.server.errors import ApiError, unsupported

Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]
# Only the first error is told: to collect a million would hold up all other answers for seconds.
Tokens = Annotated[list[StrictInt], Field(fail_fast=True)]
Texts = Annotated[list[StrictStr], Field(fail_fast=True)]
Parts = Annotated[list[dict[str, Any]], Field(fail_fast=True)]
# Looked at by SamplingParams, which ends at the first that is wrong.
Bias = Annotated[Any, WithJsonSchema({"type": "number"})]
# Every new text is searched for them, which holds up all other answers.
StopString = Annotated[StrictStr, Field(max_length=1000)]
Stop = StopString | Annotated[list[StopString], Field(max_length=16)]
MAX_MESSAGES = 1 << 14
MAX_METADATA = 16  # pairs, as in OpenAI's interface
DEFAULT_MAX_TOKENS = 16  # of a text completion, as in OpenAI's interface


class Body(BaseModel):
    """What all bodies have in common."""

    model_config = ConfigDict(extra="ignore", protected_namespaces=(), defer_build=True)

    # Field -> values that mean nothing, besides null and absence.
    NEUTRAL: ClassVar[dict[str, tuple[Any, ...]]] = {}

    model: StrictStr | None = None

    def refuse_unsupported(self) -> None:
        """Raises ApiError for a field that this server would have to ignore."""
        for name, neutral in self.NEUTRAL.items():
            value = getattr(self, name)
            if value is not None and not any(value == other and type(value) is type(other) for other in neutral):
                raise unsupported(name)


class StreamOptions(BaseModel):
    """Options of a stream."""

    include_usage: StrictBool | None = None


class SamplingBody(Body):
    """How an answer is sampled: OpenAI's fields, and those that vLLM and llama.cpp have besides."""

    temperature: Number | None = None
    top_p: Number | None = None
    top_k: StrictInt | None = None
    min_p: Number | None = None
    repetition_penalty: Number | None = None
    seed: StrictInt | None = None
    max_tokens: StrictInt | None = None
    stop: Stop | None = None
    n: StrictInt | None = None
    stream: StrictBool | None = None
    stream_options: StreamOptions | None = None
    presence_penalty: Number | None = None
    frequency_penalty: Number | None = None
    logit_bias: dict[str, Bias] | None = None
    stop_token_ids: Tokens | None = None
    min_tokens: StrictInt | None = None
    ignore_eos: StrictBool | None = None
    priority: Annotated[StrictInt, Field(ge=-(1 << 31), lt=1 << 31)] | None = None
    cache_salt: StrictStr | None = None
    truncation: Literal["auto", "disabled"] | None = None

    def limit(self) -> tuple[str, int | None]:
        """The field that limits the answer's tokens, and its value; None: there is no limit."""
        return "max_tokens", self.max_tokens

    def logprob_count(self) -> tuple[str, int | None]:
        """The field that asks for log probabilities, and of how many likely tokens; None: of none at all."""
        return "logprobs", None

    @property
    def with_usage(self) -> bool:
        """Whether a stream ends with the number of tokens."""
        return bool(self.stream_options and self.stream_options.include_usage)


class JsonSchema(BaseModel):
    """A schema that an answer must be valid under. strict: it is refused if a part of it cannot be enforced."""

    name: StrictStr | None = None
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    strict: StrictBool | None = None


class ResponseFormat(BaseModel):
    """The form that an answer must have."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class CalledFunction(BaseModel):
    """What a call calls. arguments: JSON."""

    name: StrictStr
    arguments: StrictStr


class ToolCall(BaseModel):
    """A call of a function, in an answer."""

    id: StrictStr | None = None
    type: Literal["function"] = "function"
    function: CalledFunction


class ToolFunction(BaseModel):
    """A function that the model may call. parameters: a JSON schema; None: it has none. strict: see `JsonSchema`."""

    name: Annotated[StrictStr, Field(pattern="^[a-zA-Z0-9_-]{1,64}$")]
    description: StrictStr | None = None
    parameters: dict[str, Any] | None = None
    strict: StrictBool | None = None


class OfFunction(BaseModel):
    """What stands for a function, not for a tool of OpenAI's own. As the last base class, its field comes first."""

    type: Literal["function"]


class Tool(OfFunction):
    """A tool; only functions are supported."""

    function: ToolFunction


class FunctionName(BaseModel):
    """The name of a function."""

    name: StrictStr


class NamedTool(OfFunction):
    """The function that has to be called."""

    function: FunctionName


class FunctionTool(ToolFunction, OfFunction):
    """A tool in /v1/responses; only functions are supported."""


class NamedFunction(FunctionName, OfFunction):
    """The function that has to be called, in /v1/responses."""


class ChatMessage(BaseModel):
    """A message. Further fields reach the chat template, as "name" may."""

    model_config = ConfigDict(extra="allow")

    role: StrictStr
    content: StrictStr | Parts | None = None
    tool_calls: Annotated[list[ToolCall], Field(fail_fast=True)] | None = None


class ThinkingBody(SamplingBody):
    """What asks a model that may think first."""

    chat_template_kwargs: dict[str, Any] | None = None

    def thinking(self) -> bool | None:
        """What `chat_template_kwargs` says of it; they have no other use. Raises ApiError for anything else in them."""
        given = {name: value for name, value in (self.chat_template_kwargs or {}).items() if value is not None}
        for name in given:
            if name != "enable_thinking":
                raise unsupported(f"chat_template_kwargs.{printable(name, 60)}")
        thinking = given.get("enable_thinking")
        if not isinstance(thinking, bool | None):
            field = "chat_template_kwargs.enable_thinking"
            raise ApiError(400, f"{field} must be true or false", param=field, code="invalid_value")
        return thinking


class ChatBody(ThinkingBody):
    """POST /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]
    max_completion_tokens: StrictInt | None = None
    logprobs: StrictBool | None = None
    top_logprobs: StrictInt | None = None
    response_format: ResponseFormat | None = None
    tools: Annotated[list[Tool], Field(max_length=128)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: StrictBool | None = None
    functions: list[Any] | None = None
    function_call: Any = None
    modalities: Texts | None = None
    audio: dict[str, Any] | None = None
    web_search_options: dict[str, Any] | None = None

    NEUTRAL = {
        "functions": ([],),
        "function_call": ("none", "auto"),
        "modalities": (["text"],),
        "audio": (),
        "web_search_options": (),
    }

    def limit(self) -> tuple[str, int | None]:
        """Under its newer name, if that is given."""
        if self.max_completion_tokens is None:
            return super().limit()
        return "max_completion_tokens", self.max_completion_tokens

    def logprob_count(self) -> tuple[str, int | None]:
        """None unless `logprobs` is true."""
        return "top_logprobs", (self.top_logprobs or 0) if self.logprobs else None


class CompletionBody(SamplingBody):
    """POST /v1/completions."""

    prompt: StrictStr | Tokens | Texts | Annotated[list[Tokens], Field(fail_fast=True)]
    echo: StrictBool | None = None
    logprobs: StrictInt | None = None
    best_of: StrictInt | None = None
    suffix: StrictStr | None = None
    response_format: ResponseFormat | None = None

    NEUTRAL = {"best_of": (1,), "suffix": ("",)}

    def limit(self) -> tuple[str, int | None]:
        """A few tokens, unless it is given."""
        return "max_tokens", DEFAULT_MAX_TOKENS if self.max_tokens is None else self.max_tokens

    def logprob_count(self) -> tuple[str, int | None]:
        """The one field says both."""
        return "logprobs", self.logprobs


class TextFormat(JsonSchema):
    """The form that a response's text must have: a schema and what is said of it stand beside the type."""

    type: Literal["text", "json_object", "json_schema"]


class ResponseText(BaseModel):
    """The form of a response's text."""

    format: TextFormat | None = None


class InputItem(BaseModel):
    """An item of the input: a message, a call of a function (function_call), or its result (function_call_output)."""

    type: StrictStr = "message"
    role: StrictStr | None = None
    content: StrictStr | Parts | None = None
    call_id: StrictStr | None = None
    name: StrictStr | None = None
    arguments: StrictStr | None = None
    output: StrictStr | Parts | None = None


class ResponseBody(ThinkingBody):
    """POST /v1/responses."""

    input: StrictStr | Annotated[list[InputItem], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]
    instructions: StrictStr | None = None
    max_output_tokens: StrictInt | None = None
    metadata: Annotated[dict[str, Any], Field(max_length=MAX_METADATA)] | None = None
    text: ResponseText | None = None
    store: StrictBool | None = None
    background: StrictBool | None = None
    previous_response_id: StrictStr | None = None
    conversation: Any = None
    prompt: Any = None
    include: list[Any] | None = None
    tools: Annotated[list[FunctionTool], Field(max_length=128)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedFunction | None = None
    parallel_tool_calls: StrictBool | None = None
    top_logprobs: StrictInt | None = None

    NEUTRAL = {
        "store": (False,),
        "background": (False,),
        "previous_response_id": (),
        "conversation": (),
        "prompt": (),
        "include": ([],),
        "top_logprobs": (0,),
        "n": (1,),
    }

    def limit(self) -> tuple[str, int | None]:
        """Under the name that responses have."""
        return "max_output_tokens", self.max_output_tokens


class EmbeddingBody(Body):
    """POST /v1/embeddings."""

    input: (
        StrictStr
        | Tokens
        | Annotated[list[StrictStr], Field(max_length=2048)]
        | Annotated[list[Tokens], Field(max_length=2048)]
    )
    dimensions: StrictInt | None = None
    encoding_format: Literal["float", "base64"] | None = None


class TokenizeBody(Body):
    """POST /tokenize: of a prompt, or of messages."""

    prompt: StrictStr | None = None
    messages: Annotated[list[ChatMessage], Field(max_length=MAX_MESSAGES, fail_fast=True)] | None = None
    add_special_tokens: StrictBool | None = None
    add_generation_prompt: StrictBool | None = None
    return_token_strs: StrictBool | None = None


class DetokenizeBody(Body):
    """POST /detokenize."""

    tokens: Tokens


class ErrorDetail(BaseModel):
    """What is wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """The body of every error."""

    error: ErrorDetail
