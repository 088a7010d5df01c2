"""The errors that end a command with one clear message and no traceback."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable
from types import ModuleType


class UserError(ValueError):
    """The user's input cannot work: a key, a value or a file."""

    exit_code = 2


class RunFailed(RuntimeError):
    """A run cannot go on, for a reason outside of the code, which the message says in full."""

    exit_code = 1


class Stopped(Exception):
    """A signal stopped the run: after a checkpoint was saved, or before its first step."""

    exit_code = 3


# What ends a command with its message alone; anything else is a fault of the code.
EXPECTED = (UserError, RunFailed, Stopped)


def ending(kind: str, message: str) -> str:
    """Return the line that says how a command ended, "error: …" or "stopped: …"."""
    return message if message.startswith(f"{kind} ") else f"{kind}: {message}"


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return "; did you mean X?" for the known name nearest to `name`, or an empty string."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"; did you mean {near[0]}?" if near else ""


def need(module: str, what: str, *, extra: str = "hf") -> ModuleType:
    """Import and return a module of an extra.

    Raises UserError, which says that `what` needs it, when it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(not_installed(module, what, extra)) from error


def not_installed(module: str, what: str, extra: str) -> str:
    """Return the message that `what` needs a module that is not installed."""
    return f"{what} needs {module}, which is not installed: pip install 'lunaris-codex[{extra}]'"
