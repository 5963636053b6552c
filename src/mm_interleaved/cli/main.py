"""The command `mm-interleaved`: which commands there are, and how every one of them ends.

Nothing here or in the command modules imports torch or transformers before a command runs.
"""

from __future__ import annotations

import logging
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import NoReturn

import typer

from mm_interleaved.cli import (
    chat,
    compare,
    data,
    evaluate,
    explain,
    generate,
    models,
    process,
    redo,
    serve,
    shortcuts,
    studio,
    system,
    train,
)
from mm_interleaved.cli.command import CommandGroup, TyperUsageError
from mm_interleaved.cli.output import say_error
from mm_interleaved.errors import MMInterleavedError, memory_wanted
from mm_interleaved.files import disk_failure
from mm_interleaved.versions import __version__

PROGRAM = "mm-interleaved"
BUG, USAGE, STORAGE, STOPPED, INTERRUPTED = 1, 2, 6, 75, 130
# More than the machine has was asked of it: a matter of settings, like everything that ends with 2.
_LESS_MEMORY = (
    "use --dtype bfloat16, fewer --num-candidates or --num-beams, a smaller --height and --width, or another "
    "--device; `plan` estimates what a model needs"
)


class Stopped(BaseException):
    """SIGTERM arrived. No Exception, so that nothing on the way takes it for a failed record."""


def create_app() -> typer.Typer:
    """All commands."""
    app = empty_app(
        PROGRAM, "A document of text and images goes in, a longer document of text and images comes out."
    )
    for module in (
        generate, redo, explain, shortcuts, chat, serve, studio, models, train, evaluate, compare, data,
        system,
    ):  # fmt: skip
        module.add_to(app)
    return app


def empty_app(program: str, help: str) -> typer.Typer:
    """A program without commands yet, which are shown and which end as all of ours."""
    app = typer.Typer(
        name=program,
        cls=CommandGroup,
        help=help,
        add_completion=False,
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )

    @app.callback()
    def options(
        version: bool = typer.Option(
            False, "--version", help="Print the version.", callback=_print_version, is_eager=True
        ),
    ):
        pass

    return app


def run(arguments: Sequence[str], create: Callable[[], typer.Typer] = create_app) -> int:
    """Run one command of a program; returns the exit code, with one sentence on stderr where it is not 0."""
    logging.basicConfig(level=logging.WARNING, format=f"{PROGRAM}: %(message)s")
    debug = "--debug" in arguments
    try:
        app = create()
        code = app(args=list(arguments), prog_name=app.info.name, standalone_mode=False)
        if code == INTERRUPTED:  # typer turns Ctrl-C into an exit code by itself
            raise KeyboardInterrupt
        return code if isinstance(code, int) else 0
    except MMInterleavedError as error:
        return _fail(str(error), error.exit_code, debug)
    except TyperUsageError as error:
        sentence = getattr(error, "format_message", error.__str__)()
        return _fail(sentence or "expected a command, found none", USAGE, debug)
    except (KeyboardInterrupt, typer.Abort):
        return _fail("interrupted", INTERRUPTED, debug=False)
    except Stopped:
        return _fail(
            "stopped by a signal; what is finished is saved, run the same command again to go on",
            STOPPED,
            debug,
        )
    except BrokenPipeError:
        # Whoever read our output has gone; there is nobody left to tell.
        sys.stdout = None
        return 0
    except Exception as error:
        if (wanted := memory_wanted(error)) is not None:
            return _fail(f"{wanted}; {_LESS_MEMORY}", USAGE, debug)
        if (reason := disk_failure(error)) is not None:
            where = getattr(error, "filename", None)
            return _fail(f"{where or 'the output'}: cannot be written ({reason})", STORAGE, debug)
        sentence = f"{type(error).__name__}: {error}"
        return _fail(f"a bug of ours: {sentence} (--debug shows where; please report it)", BUG, debug)


def main(create: Callable[[], typer.Typer] = create_app) -> NoReturn:
    """Entry point of the installed command."""
    signal.signal(signal.SIGTERM, stop)
    process.set_up()
    code = run(sys.argv[1:], create)
    # The work is done; a signal that comes while the interpreter ends has nothing left to stop.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.exit(code)


def stop(number: int, frame: object) -> NoReturn:
    """The handler of SIGTERM."""
    raise Stopped


def _fail(sentence: str, code: int, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    # The disk that is full may be the one that this goes to.
    with suppress(OSError):
        say_error(sentence)
    return code


def _print_version(is_wanted: bool):
    if is_wanted:
        typer.echo(f"{PROGRAM} {__version__}")
        raise typer.Exit
