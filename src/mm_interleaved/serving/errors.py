"""What goes wrong, as OpenAI's clients expect to be told: {"error": {message, type, param, code}}."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from mm_interleaved.errors import (
    InputError,
    MMInterleavedError,
    NumericalError,
    StorageError,
    TooLongError,
    UsageError,
    escape,
)

INVALID = "invalid_request_error"
SERVER = "server_error"


class ApiError(Exception):
    """An answer that is an error.

    Args:
        param: the place in the request, such as `messages.0.content.1.image_url.url`.
        code: a short word for programs.
        retry_after: seconds after which to try again.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: float | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.param, self.code = status, param, code
        self.headers = dict(headers or {})
        if retry_after is not None:
            self.headers["Retry-After"] = str(max(1, math.ceil(retry_after)))

    def body(self, request_id: str | None = None) -> dict[str, Any]:
        """The JSON of the answer."""
        kinds = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
        kind = kinds.get(self.status, INVALID if self.status < 500 else SERVER)
        error = {"message": str(self), "type": kind, "param": self.param, "code": self.code}
        return {"error": error | ({} if request_id is None else {"request_id": request_id})}


class ClientLeftError(Exception):
    """Nobody waits for the answer any more."""


def bad_request(param: str | None, message: str, code: str | None = "invalid_value") -> ApiError:
    """400, its message beginning with the place."""
    return ApiError(400, message if param is None else f"{param}: {message}", param=param, code=code)


def api_error(error: BaseException, params: Mapping[str, str] | None = None) -> ApiError:
    """Any error as an answer. What only we can have caused says nothing of our insides.

    Args:
        params: places in the request by the names that settings have here.
    """
    names = params or {}
    match error:
        case ApiError():
            return error
        case TooLongError():
            return ApiError(400, str(error), param="messages", code="context_length_exceeded")
        case InputError() | UsageError():
            field = error.field or ""
            param = names.get(field, field.removeprefix("generation.") or None)
            return ApiError(400, _renamed(str(error), field, param), param=param, code="invalid_value")
        case MMInterleavedError(code="queue_full" | "draining"):
            status = 429 if error.code == "queue_full" else 503
            retry_after = getattr(error, "retry_after", 1)
            return ApiError(status, str(error), code=error.code, retry_after=retry_after)
        case NumericalError():
            return ApiError(500, "the model computed a number that is not finite", code=error.code)
        case StorageError():
            return ApiError(503, str(error), code=error.code, retry_after=10)
        case MMInterleavedError():
            return ApiError(500, "the server failed", code=error.code)
        case _:
            return ApiError(500, "the server failed", code="internal_error")


def _renamed(message: str, field: str, param: str | None) -> str:
    """The sentence with the name that the client used."""
    if param and field and param != field and message.startswith(f"{field}:"):
        return f"{param}{message.removeprefix(field)}"
    return message


def log_text(value: Any, limit: int = 120) -> str:
    """A value of a client's for a line of a log."""
    return escape(str(value), limit)
