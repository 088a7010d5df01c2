"""Classes that a config names by `_target_`."""

from __future__ import annotations

import importlib
from typing import Any

from lunaris.errors import UserError


def load_class(key: str, dotted: str) -> Any:
    """Return what a `_target_`, given as `key`, names. Raises UserError when there is no such."""
    module, _, name = dotted.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise UserError(f"{key}={dotted}: cannot be imported: {error}") from error
