"""A request's body as a checked object: strict JSON, strict types, unknown names refused with the nearest.

Error places are written as OpenAI's: `messages.0.content.1.image_url.url`.
"""

from __future__ import annotations

import asyncio
import re
import typing
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar, cast

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator
from starlette.requests import ClientDisconnect, Request

from mm_interleaved.documents.strict_json import describe, parse_strict
from mm_interleaved.errors import InputError, escape
from mm_interleaved.serving.errors import ApiError, ClientLeftError
from mm_interleaved.spelling import hint

LONG_BODY = 256 * 2**10
"""Bytes from which on a body is parsed beside the event loop."""
_VALID = re.compile(r"^a valid (\w)")
_CLEAREST = {"literal_error": 0, "extra_forbidden": 1}
"""Of problems at one depth: a part of another kind has the wrong names, too."""
_JSON = ("application/json", "text/json")


class Strict(BaseModel):
    """An object of a request: `true` is no number, "5" is none either, and nothing is ignored."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class Echoed(Strict):
    """What clients send back of answers: their libraries add names of their own, empty ones."""

    @model_validator(mode="before")
    @classmethod
    def _without_empty(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        given = cast(dict[str, Any], value)
        return {name: each for name, each in given.items() if each is not None or name in cls.model_fields}


Model = TypeVar("Model", bound=Strict)


async def read_body(request: Request, model: type[Model]) -> Model:
    """The body of a request.

    Raises:
        ApiError: 415 where it says to be no JSON, 400 where it is none, or not what the model says.
        ClientLeftError: before its end.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    # A web page can send other kinds anywhere without being asked by its browser.
    if kind not in _JSON and not kind.endswith("+json"):
        raise ApiError(415, f"Content-Type: found {escape(kind) or 'none'!r}, expected application/json")
    try:
        body = await request.body()
    except ClientDisconnect as error:
        raise ClientLeftError from error
    if len(body) < LONG_BODY:
        return checked(body, model)
    return await asyncio.to_thread(checked, body, model)


def checked(body: bytes, model: type[Model]) -> Model:
    """The object that the bytes of a body hold. Raises ApiError."""
    try:
        text = body.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ApiError(400, f"body: not UTF-8 at byte {error.start}", code="invalid_json") from error
    try:
        value = parse_strict(text, "body")
    except InputError as error:
        raise ApiError(400, str(error), param=error.field, code="invalid_json") from error
    if not isinstance(value, dict):
        raise ApiError(400, f"body: found {describe(value)}, expected an object", code="invalid_json")
    try:
        return model.model_validate(value)
    except ValidationError as error:
        raise _validation_error(error, value, model) from error


def _validation_error(error: ValidationError, value: Any, model: type[BaseModel]) -> ApiError:
    """The error deepest in the request: of the kinds that a value may have, it is the one meant."""
    found = [(_place(problem["loc"], value), problem) for problem in error.errors(include_url=False)]
    deepest = max(len(place) for place, _ in found)
    same = [(place, problem) for place, problem in found if len(place) == deepest]
    place, problem = min(same, key=lambda each: _CLEAREST.get(each[1]["type"], len(_CLEAREST)))
    param = ".".join(str(step) if isinstance(step, int) else escape(step, 40) for step in place)
    if problem["type"].startswith("union_tag"):
        # A function that tells kinds apart is named by itself: `_type()`.
        name = problem.get("ctx", {})["discriminator"].strip("'_()")
        param = f"{param}.{name}".lstrip(".")
    others = [each for at, each in same if at == place]
    code, sentence = _sentence(problem, others, place, _known(model, place))
    return ApiError(400, f"{param}: {sentence}", param=param, code=code)


def _sentence(
    problem: Any, all_problems: Sequence[Any], place: Sequence[str | int], known: Iterable[str]
) -> tuple[str, str]:
    """A code, and what was found and expected."""
    match problem["type"]:
        case "extra_forbidden":
            return "unknown_parameter", f"no such field, {hint(str(place[-1]), sorted(known))}"
        case "missing" | "union_tag_not_found":
            return "missing_required_parameter", "missing"
        case "union_tag_invalid":
            tags = problem["ctx"]["expected_tags"].replace("'", "")
            return "invalid_value", f"found {escape(problem['ctx']['tag'], 40)!r}, expected one of {tags}"
        case _:
            expected = " or ".join(dict.fromkeys(map(_expected, all_problems)))
            return "invalid_value", f"found {_found(problem['input'])}, expected {expected}"


def _expected(problem: Any) -> str:
    """The end of a sentence of pydantic's that says what it wants."""
    context = problem.get("ctx", {})
    match problem["type"]:
        case "too_long" if context["max_length"] == 0:
            return "none, as this server does nothing of that kind"
        case "too_long" | "too_short":
            most, least = context.get("max_length"), context.get("min_length")
            return f"at least {least}" if most is None else f"at most {most}"
        case "none_required":
            return "null, as this server does nothing of that kind"
        case _:
            message = problem["msg"].removeprefix("Input should be ").removeprefix("String should have ")
            return _VALID.sub(_with_article, message)


def _with_article(match: re.Match[str]) -> str:
    return f"{'an' if match[1] in 'aeiou' else 'a'} {match[1]}"


def _found(value: Any) -> str:
    """A value in a few words."""
    match value:
        case bool():
            return str(value).lower()
        case list():
            return f"a list of {len(value)}"
        case _:
            return describe(value)


def _place(location: Sequence[str | int], body: Any) -> tuple[str | int, ...]:
    """Where in the request an error is: the location without the names of the kinds that were tried."""
    place: list[str | int] = []
    value: Any = body
    for position, step in enumerate(location):
        is_object = isinstance(value, dict)
        if (is_object and step in value) or (isinstance(value, list) and isinstance(step, int)):
            value = cast(Any, value)[step]
        elif not (is_object and position == len(location) - 1):
            continue
        place.append(step)
    return tuple(place)


def _known(model: type[BaseModel], place: Sequence[str | int]) -> set[str]:
    """The names that may stand at the end of a place."""
    models = [model]
    for step in place[:-1]:
        inside = [each.model_fields[step].annotation for each in models if step in each.model_fields]
        if inside:
            models = [found for annotation in inside for found in _models(annotation)]
    return {name for each in models for name in each.model_fields}


def _models(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [found for argument in typing.get_args(annotation) for found in _models(argument)]
