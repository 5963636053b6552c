"""Nothing that a model or a file says can act on the terminal."""

from __future__ import annotations

from mm_interleaved.cli.output import say, say_error

HOSTILE = "red\x1b[31m \x1b]0;title\x07\x9b2J\r\x00\ud800 lamp"


def test_results_and_errors_hold_no_control_sequence(capsys):
    say(f"a\tb\n{HOSTILE} ü \N{FAMILY}")
    say_error(HOSTILE)
    told = capsys.readouterr()
    assert told.out == "a\tb\nred[31m ]0;title2J lamp ü \N{FAMILY}\n"
    assert told.err == "mm-interleaved: red[31m ]0;title2J lamp\n"
