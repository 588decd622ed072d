"""The fields of a request that say how its answers are sampled, as the engine takes them."""

from dataclasses import replace
from typing import Any

from bitnet_numba.engine.engine import Engine
from bitnet_numba.errors import BitNetError, RequestError, shown
from bitnet_numba.sampling_params import SamplingParams
from bitnet_numba.server.errors import ApiError, from_request_error
from bitnet_numba.server.schemas import SamplingBody

OPENAI_DEFAULT = SamplingParams(temperature=1.0, max_new_tokens=None)
SEEDS = 1 << 64
# Fields that are those of SamplingParams, by the same names.
SAME = (
    "temperature",
    "top_p",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "logit_bias",
    "stop",
    "stop_token_ids",
    "min_tokens",
    "ignore_eos",
)


def sampling_params(body: SamplingBody, engine: Engine) -> SamplingParams:
    """What a body asks for, on top of what the model's folder recommends. Raises ApiError, naming a wrong field.

    Without a limit, an answer goes on until the model stops or the context is full.
    """
    # Field of the request -> field of SamplingParams, and its value.
    given: dict[str, tuple[str, Any]] = {name: (name, getattr(body, name)) for name in SAME}
    given["top_k"] = "top_k", None if body.top_k is None else max(body.top_k, 0)  # vLLM's clients write -1 for all
    given["seed"] = "seed", None if body.seed is None else body.seed % SEEDS  # OpenAI's may be negative
    limit, logprobs = body.limit(), body.logprob_count()
    given[limit[0]] = "max_new_tokens", limit[1]
    given[logprobs[0]] = "logprobs", logprobs[1]
    values: dict[str, Any] = {"max_new_tokens": None, "overflow": "roll" if body.truncation == "auto" else "error"}
    values |= {name: value for name, value in given.values() if value is not None}
    try:
        return replace(engine.sampling or OPENAI_DEFAULT, **values)
    except RequestError as error:
        for field, (name, value) in given.items():
            if value is not None:
                check(field, name, value)
        raise from_request_error(RequestError(str(error).replace("max_new_tokens", limit[0])), "min_tokens") from None


def with_thinking(params: SamplingParams, thinking: bool | None, engine: Engine) -> SamplingParams:
    """The parameters with the switch for thinking. Raises ApiError if the model's chat template has none."""
    try:
        engine.tokenizer.check_thinking(thinking)
    except BitNetError as error:
        raise ApiError(
            400, f"chat_template_kwargs: {error}", param="chat_template_kwargs", code="unsupported_parameter"
        ) from None
    return replace(params, thinking=thinking)


def check(field: str, name: str, value: Any) -> None:
    """Raises ApiError, naming the request's field, if SamplingParams does not take a value of `name`."""
    try:
        replace(OPENAI_DEFAULT, **{name: value})
    except RequestError as error:
        raise from_request_error(RequestError(str(error).replace(name, field)), field) from None


def number_of_choices(body: SamplingBody) -> int:
    """Answers that are wanted for each prompt. Raises ApiError if there are none."""
    n = 1 if body.n is None else body.n
    if n < 1:
        raise ApiError(400, f"n must be 1 or more, not {shown(n)}", param="n", code="invalid_value")
    return n
