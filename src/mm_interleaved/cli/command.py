"""How a typed function becomes a command: flags out of the settings, `--debug`, the order of parts.

A command that takes `flags: Flags` gets every field of GenerationSettings as a kebab-case flag, and is handed
those that were given. What a command writes is named by `-o`, `--output`; an argument OUT does as well.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable, Mapping
from dataclasses import fields
from functools import cache, wraps
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer
from typer.core import TyperCommand, TyperGroup

from mm_interleaved.errors import UsageError, escape
from mm_interleaved.generation.settings import GenerationSettings
from mm_interleaved.spelling import nearest, unknown_name

_SameAsOut = Annotated[Path | None, typer.Option("-o", "--output", help="The same as OUT.", metavar="OUT")]
Flags = Mapping[str, Any]
"""The generation settings given on the command line, by name."""

TyperUsageError: type[Exception] = typer.BadParameter.__mro__[1]
"""click's UsageError; some versions of typer import click, others carry a copy of it."""
_ORDER = "mm_interleaved.order"
_PANEL = "Generation: what is not given is the document's own, then the model's (see `info MODEL`)"
_DEBUG_HELP = "Show the traceback of an error."
_FORMERLY = {"output": ("--out", "--docs")}
"""Spellings of earlier versions, by parameter; taken still, and not in the help."""


class OrderedCommand(TyperCommand):
    """A command that remembers in which order its options were typed; typer itself groups them by name.

    It takes the spellings of earlier versions, and says the right one of an option that does not exist.
    """

    def make_parser(self, ctx: Any):
        parser: Any = super().make_parser(ctx)
        own = {spelling for parameter in self.params for spelling in parameter.opts}
        for parameter in self.params:
            former = [each for each in _FORMERLY.get(parameter.name, ()) if each not in own]
            if former and parameter.param_type_name == "option":
                parser.add_option(parameter, former, dest=parameter.name)
        return parser

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        try:
            # The third result names the parameter of every option, once for each time it was typed, in order.
            _, _, typed = self.make_parser(ctx).parse_args(args=list(args))
        except TyperUsageError as error:
            # A wrong name is the kind of it that has one.
            name = getattr(error, "option_name", None)
            if name is None or not hasattr(error, "possibilities"):
                raise
            raise UsageError(self._unknown_option(name), field=name.lstrip("-")) from error
        ctx.meta[_ORDER] = [parameter.name for parameter in typed]
        return super().parse_args(ctx, args)

    def _unknown_option(self, name: str) -> str:
        arguments = [each.name for each in self.params if each.param_type_name == "argument"]
        right = nearest(name, [spelling for each in self.params for spelling in each.opts])
        if right is None:
            return f"no such option {escape(name)!r}: `{self.name} --help` lists those of {self.name}"
        if right in arguments:
            return f"no such option {escape(name)!r}: {right.upper()} is typed without a name before it"
        return f"no such option {escape(name)!r}: did you mean {right!r}?"


class CommandGroup(TyperGroup):
    """Commands; of one that does not exist, the right name is said."""

    def resolve_command(self, ctx: Any, args: list[str]):
        if args and self.get_command(ctx, args[0]) is None and not args[0].startswith("-"):
            raise UsageError(unknown_name("command", args[0], self.list_commands(ctx)))
        return super().resolve_command(ctx, args)


def typed_in_order(context: typer.Context, **values: list[Any]) -> list[tuple[str, Any]]:
    """Repeated options as (name, value), in the order in which they were typed."""
    left = {name: iter(items) for name, items in values.items()}
    return [(name, next(left[name])) for name in context.meta[_ORDER] if name in left]


def command(app: typer.Typer, name: str | None = None, *, panel: str | None = None) -> Callable[..., Any]:
    """Register a function as a command of `app`; its docstring is the help, what it returns the exit code."""

    def register(function: Callable[..., int | None]) -> Callable[..., int | None]:
        signature = inspect.signature(function, eval_str=True)
        parameters = [_by_keyword(p) for p in signature.parameters.values() if p.name != "flags"]
        takes_flags = len(parameters) < len(signature.parameters)
        parameters += _flag_parameters() if takes_flags else ()
        debug = Annotated[bool, typer.Option("--debug", help=_DEBUG_HELP)]
        parameters.append(_keyword("debug", debug, False))
        has_out, needs_out = "out" in signature.parameters, False
        if has_out:
            needs_out = signature.parameters["out"].default is inspect.Parameter.empty
            parameters.append(_keyword("output", _SameAsOut, None))
        names = {field.name for field in fields(GenerationSettings)}

        @wraps(function)
        def run(**arguments: Any) -> int | None:
            arguments.pop("debug")
            if has_out:
                arguments["out"] = _one_out(arguments["out"], arguments.pop("output"), is_needed=needs_out)
            if takes_flags:
                given = {key: arguments.pop(key) for key in list(arguments) if key in names}
                typed = {key: value for key, value in given.items() if value is not None}
                # In the one spelling that each value has, so that a rerun is the same run.
                arguments["flags"] = GenerationSettings(**typed).given()
            return function(**arguments)

        vars(run)["__signature__"] = signature.replace(parameters=parameters)
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        app.command(name, cls=OrderedCommand, help=_unwrapped(function), rich_help_panel=panel)(run)
        return function

    return register


def _unwrapped(function: Callable[..., Any]) -> str:
    """The docstring with a line for each paragraph: the terminal's width breaks lines, not the source's."""
    paragraphs = inspect.cleandoc(function.__doc__ or "").split("\n\n")
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)


def field_help(dataclass: type) -> dict[str, str]:
    """The docstring under each field of a dataclass, which is its help text."""
    [definition] = ast.parse(inspect.cleandoc(inspect.getsource(dataclass))).body
    assert isinstance(definition, ast.ClassDef)
    found: dict[str, str] = {}
    for statement, follower in zip(definition.body, definition.body[1:], strict=False):
        match statement, follower:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                found[name] = inspect.cleandoc(text)
            case _:
                pass
    return found


@cache
def _flag_parameters() -> tuple[inspect.Parameter, ...]:
    """The same for all commands; reading the help out of the source takes a while."""
    helps, hints = field_help(GenerationSettings), get_type_hints(GenerationSettings)
    parameters = []
    for field in fields(GenerationSettings):
        kebab = field.name.replace("_", "-")
        names = [f"--{kebab}/--no-{kebab}"] if field.type in (bool, "bool") else [f"--{kebab}"]
        # None stands for "not given": then the document's holds, or the model's, or last the general one.
        default = "" if field.default is None else f" (the model's own, else {field.default})"
        help_text = f"{helps[field.name].rstrip('.')}{default}."
        option = typer.Option(*names, help=help_text, show_default=False, rich_help_panel=_PANEL)
        parameters.append(_keyword(field.name, Annotated[hints[field.name] | None, option], None))
    return tuple(parameters)


def _by_keyword(parameter: inspect.Parameter) -> inspect.Parameter:
    """As typer passes it; OUT may be left out, since -o may give it."""
    default = None if parameter.name == "out" else parameter.default
    return parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY, default=default)


def _one_out(argument: Path | None, option: Path | None, *, is_needed: bool) -> Path | None:
    if argument is not None and option is not None:
        raise UsageError(f"give either OUT or -o, found both ({str(argument)!r}, {str(option)!r})")
    if is_needed and argument is None and option is None:
        raise UsageError("expected OUT, what to write, as the last argument or with -o")
    return option if argument is None else argument


def _keyword(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
