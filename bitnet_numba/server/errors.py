"""Errors of the interface, in the form that OpenAI's clients read."""

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from bitnet_numba.errors import ContextFull, RequestError, printable

# Status -> the error's type.
TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}
MAX_MESSAGE = 1000  # characters


class ApiError(Exception):
    """An answer that is an error."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        """param: the field of the request that is wrong. code: for programs. headers: of the response, besides."""
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = dict(headers or {})

    def content(self) -> dict[str, Any]:
        """The body of the response."""
        default = "server_error" if self.status >= 500 else "invalid_request_error"
        error = {
            "message": printable(self.message, MAX_MESSAGE),
            "type": TYPES.get(self.status, default),
            "param": self.param,
            "code": self.code,
        }
        return {"error": error}


def unsupported(field: str, why: str = "this server does not support it") -> ApiError:
    """The refusal of a field, which is never ignored where it would change the answer."""
    return ApiError(400, f"{field}: {why}", param=field, code="unsupported_parameter")


def busy(message: str, code: str, retry_after: int = 1) -> ApiError:
    """503: later, or elsewhere."""
    return ApiError(503, message, code=code, headers={"retry-after": str(retry_after)})


def from_validation(error: ValidationError) -> ApiError:
    """What pydantic found first in a body, with the path of the field."""
    first = _nearest(error.errors(include_url=False, include_context=False, include_input=False))
    path = ".".join(str(part) for part in first["loc"] if not _is_member(part))
    message = f"{path}: {first['msg']}" if path else first["msg"]
    code = "invalid_json" if first["type"] == "json_invalid" else "invalid_value"
    return ApiError(400, message, param=path or None, code=code)


def _nearest(errors: list[ErrorDetails]) -> ErrorDetails:
    """The first error; where that is of a union, which has one for each member, that of the member that came furthest.

    A list with too many texts is told that it is too long, not that it is no text.
    """
    loc = errors[0]["loc"]
    field = loc[: next((i for i, part in enumerate(loc) if _is_member(part)), len(loc))]

    def reached(error: ErrorDetails) -> tuple[bool, int, tuple[int, ...]]:
        path = [part for part in error["loc"] if not _is_member(part)]
        other_kind = error["type"].endswith("_type") or error["type"] in ("literal_error", "missing")
        return not other_kind, len(path), tuple(part for part in path if isinstance(part, int))

    return max((other for other in errors if other["loc"][: len(field)] == field), key=reached)


def _is_member(part: int | str) -> bool:
    """Whether a part of a location is a member of a union, such as str, list[str] or a class, and not a field."""
    return isinstance(part, str) and (part == "str" or not part.isidentifier() or part[0].isupper())


def from_request_error(error: RequestError, param: str | None = None) -> ApiError:
    """A prompt or an option that the engine refuses. param: the field, unless the error knows it."""
    code = "context_length_exceeded" if isinstance(error, ContextFull) else "invalid_value"
    return ApiError(400, str(error), param=error.option or param, code=code)
