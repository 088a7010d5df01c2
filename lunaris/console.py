"""What a person sees of a run: lines, and on a terminal a changing part below them.

Where standard output is not a terminal there are plain lines alone, without colours.
"""

from __future__ import annotations

import os
import shutil
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.live import Live

# The columns that the lines of a run need.
WIDTH = 60
_LABEL = 11

# What this process does at the moment, in words, where that takes longer than a step.
_phases: list[str] = []
_below: Below | None = None


def say(text: str) -> None:
    """Print lines to standard output, above what changes."""
    print(text, flush=True)


def labelled(label: str, text: str) -> str:
    """Return "label      text", broken into lines of 60 columns. Words stay whole."""
    return textwrap.fill(
        text,
        WIDTH,
        initial_indent=f"{label:<{_LABEL}}",
        subsequent_indent=" " * _LABEL,
        break_long_words=False,
        break_on_hyphens=False,
    )


def fitted(text: str) -> str:
    """Return lines of prose that a terminal does not break within a word; elsewhere, `text`."""
    if not is_terminal(sys.stdout):
        return text
    columns = shutil.get_terminal_size().columns
    lines = (
        textwrap.wrap(line, columns, break_long_words=False, break_on_hyphens=False) or [""]
        for line in text.splitlines()
    )
    return "\n".join(part for parts in lines for part in parts)


def is_terminal(stream: TextIO) -> bool:
    """Return whether a stream is a terminal whose lines can be written again."""
    return stream.isatty() and os.environ.get("TERM", "dumb") not in ("dumb", "unknown")


def terminal(stream: TextIO) -> Console:
    """Return rich's console of a stream, or of the terminal below a `Tee`."""
    from rich.console import Console

    raw: Any = stream.console if isinstance(stream, Tee) else stream
    return Console(file=raw, highlight=False, emoji=False)


@contextmanager
def phase(text: str, *, log: bool = True) -> Iterator[None]:
    """Show what this process does in this context, in words.

    On a terminal it stands below the lines until the context ends. Elsewhere it is a line of
    standard error, if `log`.
    """
    _phases.append(text)
    alone = None
    try:
        if not is_terminal(sys.stdout):
            if log:
                print(text, file=sys.stderr, flush=True)
        elif _below is None:
            alone = Below(text)
            alone.start()
        else:
            _below.refresh()
        yield
    finally:
        _phases.pop()
        if alone is not None:
            alone.stop()
        elif _below is not None:
            _below.refresh()


def current_phase() -> str:
    """Return the words of the innermost `phase` that this process is in, or an empty string."""
    return _phases[-1] if _phases else ""


class Below:
    """Something that stays below the lines which this process prints to a terminal.

    It is drawn again when its owner asks for that and when a line is printed. No thread draws it,
    because workers are forked from this process.
    """

    def __init__(self, shown: RenderableType) -> None:
        self._shown = shown
        self._live: Live | None = None
        self._before: list[tuple[str, TextIO]] = []

    def start(self) -> None:
        """Begin to show it, and let standard output and error print above it."""
        global _below
        from rich.live import Live

        console = terminal(sys.stdout)
        self._live = Live(
            self._shown,
            console=console,
            auto_refresh=False,
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
        )
        self._live.start(refresh=True)
        # A process that is killed would leave the terminal without its cursor.
        console.show_cursor(True)
        _below = self
        for name in ("stdout", "stderr"):
            stream: TextIO = getattr(sys, name)
            if stream.isatty():
                self._before.append((name, _redirect(name, _Above(console, stream))))

    def refresh(self) -> None:
        """Draw it again."""
        if self._live is not None:
            self._live.refresh()

    def stop(self) -> None:
        """Remove it from the terminal."""
        global _below
        if self._live is None:
            return
        for name, before in self._before:
            getattr(sys, name).flush()
            _redirect(name, before)
        self._before.clear()
        self._live.stop()
        self._live, _below = None, None


def _redirect(name: str, target: Any) -> TextIO:
    """Send sys.stdout or sys.stderr, or the console of its `Tee`, to `target`; return the former.

    A `Tee` keeps its log.
    """
    stream: TextIO = getattr(sys, name)
    if isinstance(stream, Tee):
        before, stream.console = stream.console, target
        return before
    setattr(sys, name, target)
    return stream


class _Above:
    """A text stream whose lines rich prints above what it shows; otherwise the terminal itself."""

    def __init__(self, console: Console, stream: TextIO) -> None:
        self._console = console
        self._stream: TextIO = stream.console if isinstance(stream, Tee) else stream
        self._line = ""

    def write(self, text: str) -> int:
        # Not wrapped, so that a command can be copied: the terminal breaks the line.
        *lines, self._line = (self._line + text).split("\n")
        if lines:
            self._console.out("\n".join(lines), highlight=False)
        return len(text)

    def flush(self) -> None:
        pass

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class Tee:
    """A text stream that writes to a console and to a log, and otherwise is the console.

    A progress line that is overwritten (it contains a carriage return) is not logged. When the
    reader of the console has left, as `head` does, the log alone is written.
    """

    def __init__(self, console: TextIO, log: TextIO) -> None:
        self.console = console
        self._log = log

    def write(self, text: str) -> int:
        if "\r" not in text:
            self._log.write(text)
        try:
            return self.console.write(text)
        except BrokenPipeError:
            self._discard_console()
            return len(text)

    def flush(self) -> None:
        try:
            self.console.flush()
        except BrokenPipeError:
            self._discard_console()

    def _discard_console(self) -> None:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, self.console.fileno())
        os.close(null)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.console, name)
