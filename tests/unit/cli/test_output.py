"""Nothing that a model or a file says can act on the terminal."""

from __future__ import annotations

import pytest

from mm_interleaved.cli import output
from mm_interleaved.cli.output import progress, say, say_error

HOSTILE = "red\x1b[31m \x1b]0;title\x07\x9b2J\r\x00\ud800 lamp"


def test_results_and_errors_hold_no_control_sequence(capsys):
    say(f"a\tb\n{HOSTILE} ü \N{FAMILY}")
    say_error(HOSTILE)
    told = capsys.readouterr()
    assert told.out == "a\tb\nred[31m ]0;title2J lamp ü \N{FAMILY}\n"
    assert told.err == "mm-interleaved: red[31m ]0;title2J lamp\n"


@pytest.mark.parametrize(("total", "told"), [(9, "1 of 9 done, next"), (None, "1 done, next")])
def test_a_log_gets_a_line_now_and_then(capsys, monkeypatch, total, told):
    now = 100.0
    monkeypatch.setattr(output.time, "monotonic", lambda: now)
    with progress(total, "begins") as shown:
        shown.advance("at once")
        assert capsys.readouterr().err == ""
        now += output.SECONDS_BETWEEN_LINES
        shown.show("next")
        shown.show("soon after")
    assert capsys.readouterr().err == f"mm-interleaved: {told}\n"
