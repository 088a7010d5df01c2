"""The errors that end a command with one clear message and no traceback."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable
from types import ModuleType


class UserError(ValueError):
    """The user's input cannot work: a key, a value or a file."""

    exit_code = 2


class Stopped(Exception):
    """A signal stopped the run after a checkpoint was saved."""

    exit_code = 3


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return "; did you mean X?" for the known name nearest to `name`, or an empty string."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"; did you mean {near[0]}?" if near else ""


def need(module: str, what: str) -> ModuleType:
    """Import and return a module of the extra `hf`.

    Raises UserError, which says that `what` needs it, when it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(
            f"{what} needs {module.partition('.')[0]}, which is not installed: "
            "pip install 'lunaris-codex[hf]'"
        ) from error
