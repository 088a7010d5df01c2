"""The console: plain lines in pipes and logs, and on a terminal a changing part below them."""

from __future__ import annotations

import io
import os
import re
import sys
from collections.abc import Callable

import pytest
from rich.text import Text

from lunaris.console import Below, Tee, current_phase, fitted, is_terminal, labelled, phase, say
from lunaris.metrics.progress import Progress

_ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
_COLOURS = re.compile(r"\x1b\[[0-9;]*(3[0-9]|4[0-9]|38;[0-9;]+)m")
ROW = {"step": 120_000, "train/loss": 4.1234, "val/loss": 4.2222, "perf/tokens_per_s": 1234567.0}


@pytest.mark.parametrize("columns", [36, 60, 100])
@pytest.mark.parametrize("left", ["", "12:34:56 left"])
def test_the_line_fits_and_never_cuts_the_loss(
    on_terminal: Callable[[int], io.StringIO], columns: int, left: str
) -> None:
    screen = on_terminal(columns)
    progress = Progress(120_000, 300_000)
    progress.take(ROW)
    progress.left = left
    below = Below(progress)
    below.start()
    shown = _ESCAPES.sub("", screen.getvalue()).strip("\r\n")
    below.stop()
    assert len(shown.rstrip()) <= columns
    assert "step 120000/300000" in shown
    assert "loss 4.1234" in shown
    assert ("tokens/s" in shown) is (columns == 100)
    if columns >= 60:
        assert left in shown


def test_a_log_has_the_lines_and_not_what_changes(
    on_terminal: Callable[[int], io.StringIO], monkeypatch: pytest.MonkeyPatch
) -> None:
    screen, log = on_terminal(60), io.StringIO()
    monkeypatch.setattr(sys, "stdout", Tee(screen, log))
    with phase("building"):
        say("a line\nand a second one")
        print("in two ", end="")
        print("parts")
    say("after it")
    lines = "a line\nand a second one\nin two parts\nafter it\n"
    assert log.getvalue() == lines
    seen = _ESCAPES.sub("", screen.getvalue())
    assert "building" in seen
    assert seen.endswith("after it\n")
    assert isinstance(sys.stdout, Tee) and sys.stdout.console is screen


def test_a_long_line_is_not_wrapped_so_that_it_can_be_copied(
    on_terminal: Callable[[int], io.StringIO],
) -> None:
    screen = on_terminal(60)
    command = "lunaris generate " + "runs/very_long_name " * 6
    with phase("working"):
        print(command)
    assert command in screen.getvalue()


def test_elsewhere_a_phase_is_a_line_of_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    with phase("building the model"):
        assert current_phase() == "building the model"
        with phase("evaluating", log=False):
            assert current_phase() == "evaluating"
    assert current_phase() == ""
    found = capsys.readouterr()
    assert (found.out, found.err) == ("", "building the model\n")


@pytest.mark.parametrize("term", ["dumb", "unknown", ""])
def test_a_terminal_that_cannot_move_its_cursor_gets_plain_lines(
    on_terminal: Callable[[int], io.StringIO], monkeypatch: pytest.MonkeyPatch, term: str
) -> None:
    screen = on_terminal(60)
    assert is_terminal(sys.stdout)
    if term:
        monkeypatch.setenv("TERM", term)
    else:
        monkeypatch.delenv("TERM")
    with phase("building"):
        say("line")
    assert screen.getvalue() == "building\nline\n"


@pytest.mark.parametrize("no_color", [False, True])
def test_no_color_is_respected(
    on_terminal: Callable[[int], io.StringIO], monkeypatch: pytest.MonkeyPatch, no_color: bool
) -> None:
    screen = on_terminal(60)
    if no_color:
        monkeypatch.setenv("NO_COLOR", "1")
    below = Below(Text("text", "red"))
    below.start()
    below.stop()
    assert bool(_COLOURS.search(screen.getvalue())) is not no_color


def test_labelled_lines_keep_words_whole_within_60_columns() -> None:
    text = labelled("note", "word " * 30 + "a-very-long-path/" * 5)
    first, *rest = text.split("\n")
    assert first.startswith("note       word")
    assert all(line.startswith(" " * 11) for line in rest)
    assert all(len(line) <= 60 or "a-very-long-path" in line for line in (first, *rest))
    assert " ".join(text.split()[1:]) == " ".join(("word " * 30 + "a-very-long-path/" * 5).split())


def test_prose_is_broken_at_words_on_a_terminal_alone(
    on_terminal: Callable[[int], io.StringIO], capsys: pytest.CaptureFixture[str]
) -> None:
    text = "shards/mine: " + "142,595 tokens, " * 10 + "\n\nend"
    assert fitted(text) == text
    on_terminal(60)
    lines = fitted(text).split("\n")
    assert "" in lines and all(len(line) <= 60 for line in lines)
    assert " ".join(lines).split() == text.split()


def test_a_tee_goes_on_when_the_reader_of_the_console_has_left() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    log = io.StringIO()
    with os.fdopen(writing, "w", buffering=1) as console:
        tee = Tee(console, log)
        tee.write("one\n")
        tee.write("two\n")
        tee.flush()
    assert log.getvalue() == "one\ntwo\n"
