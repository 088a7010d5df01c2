"""Packages that only some input needs."""

from __future__ import annotations

import importlib
from typing import Any

from lunaris.errors import UserError


def need(module: str, what: str) -> Any:
    """Import a module of the extra `hf`. Raises UserError naming the extra without it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(
            f"{what} needs {module.partition('.')[0]}, which is not installed: "
            "pip install 'lunaris[hf]'"
        ) from error
