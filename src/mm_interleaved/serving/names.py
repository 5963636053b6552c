"""What a model's name asks for, and where the server's own files stand."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from starlette.requests import Request

from mm_interleaved.errors import escape
from mm_interleaved.serving.errors import ApiError, bad_request
from mm_interleaved.serving.request_fields import DocumentFields
from mm_interleaved.serving.settings import ServerSettings
from mm_interleaved.spelling import hint

_HOST = re.compile(r"^(?:[A-Za-z0-9.-]{1,253}|\[[0-9A-Fa-f:.]{2,45}\])(?::\d{1,5})?$")


def check_model(settings: ServerSettings, model: str | None) -> str:
    """The answer format that the name says. Raises ApiError, 404 for a model that is not served."""
    if model is None:
        return settings.aliases[settings.model]
    if model not in settings.aliases:
        raise ApiError(
            404,
            f"model: found {escape(model)!r}, {hint(model, settings.aliases)}",
            param="model",
            code="model_not_found",
        )
    return settings.aliases[model]


def answer_format(settings: ServerSettings, model: str | None, asked: str | None) -> str:
    """The format of an answer, said by the model's name or by a field. Raises ApiError if both differ."""
    named = check_model(settings, model)
    is_named = model is not None and model != settings.model
    if is_named and asked is not None and asked != named:
        raise bad_request("answer_format", f"found {asked!r}, expected {named!r} as the model's name says")
    return named if asked is None else asked


def wants_document(asked: DocumentFields, settings: Mapping[str, Any]) -> bool:
    """Whether messages are read as one running document: said, or because only images are wanted."""
    if asked.as_document is not None:
        return asked.as_document
    layout = settings.get("layout", "")
    return bool(layout) and not set(layout.replace(",", " ").upper().replace("IMAGE", "I")) - {"I", " "}


def files_url(settings: ServerSettings, request: Request) -> str:
    """Where clients find the server's own files."""
    if settings.public_url is not None:
        return f"{settings.public_url.rstrip('/')}/files"
    host = request.headers.get("host", "")
    if not _HOST.match(host):
        server = request.scope.get("server") or ("127.0.0.1", 80)
        host = f"{server[0]}:{server[1]}"
    root = request.scope.get("root_path", "")
    return f"{request.url.scheme}://{host}{root}/files"
