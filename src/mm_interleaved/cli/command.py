"""How a typed function becomes a command: flags out of the settings, `--debug`, the order of parts.

A command that takes `flags: Flags` gets every field of GenerationSettings as a kebab-case flag, and is handed
those that were given.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable, Mapping
from dataclasses import fields
from functools import cache, wraps
from typing import Annotated, Any, get_type_hints

import typer
from typer.core import TyperCommand

from mm_interleaved.generation.settings import GenerationSettings

Flags = Mapping[str, Any]
"""The generation settings given on the command line, by name."""

_ORDER = "mm_interleaved.order"
_PANEL = "Generation"
_DEBUG_HELP = "Show the traceback of an error."


class OrderedCommand(TyperCommand):
    """A command that remembers in which order its options were typed; typer itself groups them by name."""

    def parse_args(self, ctx, args):
        # The third result names the parameter of every option, once for each time it was typed, in order.
        _, _, typed = self.make_parser(ctx).parse_args(args=list(args))
        ctx.meta[_ORDER] = [parameter.name for parameter in typed]
        return super().parse_args(ctx, args)


def typed_in_order(context: typer.Context, **values: list[Any]) -> list[tuple[str, Any]]:
    """Repeated options as (name, value), in the order in which they were typed."""
    left = {name: iter(items) for name, items in values.items()}
    return [(name, next(left[name])) for name in context.meta[_ORDER] if name in left]


def command(app: typer.Typer, name: str | None = None, *, panel: str | None = None) -> Callable:
    """Register a function as a command of `app`; its docstring is the help, what it returns the exit code."""

    def register(function: Callable[..., int | None]) -> Callable[..., int | None]:
        signature = inspect.signature(function, eval_str=True)
        parameters = [p for p in signature.parameters.values() if p.name != "flags"]
        takes_flags = len(parameters) < len(signature.parameters)
        parameters += _flag_parameters() if takes_flags else ()
        debug = Annotated[bool, typer.Option("--debug", help=_DEBUG_HELP)]
        parameters.append(_keyword("debug", debug, False))
        names = {field.name for field in fields(GenerationSettings)}

        @wraps(function)
        def run(**arguments: Any) -> int | None:
            arguments.pop("debug")
            if takes_flags:
                given = {key: arguments.pop(key) for key in list(arguments) if key in names}
                arguments["flags"] = {key: value for key, value in given.items() if value is not None}
                GenerationSettings.combine(arguments["flags"])
            return function(**arguments)

        vars(run)["__signature__"] = signature.replace(parameters=parameters)
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        app.command(name, cls=OrderedCommand, rich_help_panel=panel)(run)
        return function

    return register


def field_help(dataclass: type) -> dict[str, str]:
    """The docstring under each field of a dataclass, which is its help text."""
    [definition] = ast.parse(inspect.cleandoc(inspect.getsource(dataclass))).body
    assert isinstance(definition, ast.ClassDef)
    found: dict[str, str] = {}
    for statement, follower in zip(definition.body, definition.body[1:], strict=False):
        match statement, follower:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                found[name] = inspect.cleandoc(text)
    return found


@cache
def _flag_parameters() -> tuple[inspect.Parameter, ...]:
    """The same for all commands; reading the help out of the source takes a while."""
    helps, hints = field_help(GenerationSettings), get_type_hints(GenerationSettings)
    parameters = []
    for field in fields(GenerationSettings):
        kebab = field.name.replace("_", "-")
        names = [f"--{kebab}/--no-{kebab}"] if field.type in (bool, "bool") else [f"--{kebab}"]
        # The default shown is the general one; a model may bring its own, so None stands for "not given".
        default = "" if field.default is None else f" (default: {field.default})"
        help_text = f"{helps[field.name].rstrip('.')}{default}."
        option = typer.Option(*names, help=help_text, show_default=False, rich_help_panel=_PANEL)
        parameters.append(_keyword(field.name, Annotated[hints[field.name] | None, option], None))
    return tuple(parameters)


def _keyword(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
