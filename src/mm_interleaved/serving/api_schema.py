"""The OpenAPI description of routes whose bodies we read ourselves."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from pydantic import BaseModel


class ErrorDetail(BaseModel):
    """What went wrong, and where in the request."""

    message: str
    type: str
    param: str | None
    code: str | None
    request_id: str | None = None


class ErrorBody(BaseModel):
    """OpenAI's shape of errors."""

    error: ErrorDetail


_REFUSALS = {
    400: "The request is wrong; `param` says where.",
    401: "No valid API key.",
    403: "The server does not go by that name.",
    404: "There is no such model.",
    408: "The body did not come in time.",
    413: "The body is too long.",
    415: "The body is no JSON.",
    429: "The queue is full; Retry-After says when to come back.",
    503: "The server stops; Retry-After says when to come back.",
    504: "It took too long.",
}


MAY_BE_MISSING: dict[int | str, dict[str, Any]] = {
    status: {"description": text, "model": ErrorBody}
    for status, text in {400: "The address is not valid.", 401: _REFUSALS[401], 404: "There is none."}.items()
}
"""Other answers of routes that name something."""


def documented(handler: Callable[..., Any], model: type[BaseModel]) -> dict[str, Any]:
    """Arguments of a route that describe its body and its answers."""
    schema = _inlined(model.model_json_schema())
    answers: dict[int | str, dict[str, Any]] = {
        status: {"description": text, "model": ErrorBody} for status, text in _REFUSALS.items()
    }
    answers[200] = {
        "description": "The answer, at once or as server-sent events.",
        "content": {
            "application/json": {"schema": {"type": "object"}},
            "text/event-stream": {"schema": {"type": "string"}},
        },
    }
    body = {"required": True, "content": {"application/json": {"schema": schema}}}
    return {
        "summary": inspect.getdoc(handler),
        "name": handler.__name__,
        "responses": answers,
        "response_model": None,
        "openapi_extra": {"requestBody": body},
    }


def _inlined(schema: dict[str, Any]) -> Any:
    """The schema without references to definitions of its own: in the whole description they lead nowhere."""
    definitions = schema.pop("$defs", {})

    def resolved(value: Any) -> Any:
        if isinstance(value, list):
            return [resolved(item) for item in value]
        if not isinstance(value, dict):
            return value
        if "$ref" in value:
            return resolved(definitions[value["$ref"].rpartition("/")[2]])
        # A discriminator may only point at references.
        return {key: resolved(item) for key, item in value.items() if key != "discriminator"}

    return resolved(schema)
