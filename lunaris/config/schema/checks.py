"""Checks of one value against what its key allows."""

from __future__ import annotations

import math

from lunaris.errors import UserError, did_you_mean


def one_of(key: str, value: str, allowed: tuple[str, ...]) -> None:
    """Raise UserError unless `value` is one of `allowed`."""
    if value not in allowed:
        raise UserError(
            f"{key}={value}: allowed are {', '.join(allowed)}{did_you_mean(str(value), allowed)}"
        )


def within(
    key: str, value: float | None, low: float | None = None, high: float | None = None
) -> None:
    """Raise UserError unless low <= value <= high; None (an unset optional value) passes."""
    if value is None:
        return
    _finite(key, value)
    if (low is not None and not value >= low) or (high is not None and not value <= high):
        allowed = f"at least {low}" if high is None else f"between {low} and {high}"
        raise UserError(f"{key}={value}: must be {allowed}")


def above_zero(key: str, value: float | None) -> None:
    """Raise UserError unless value > 0; None passes."""
    if value is None:
        return
    _finite(key, value)
    if not value > 0:
        raise UserError(f"{key}={value}: must be greater than 0")


def _finite(key: str, value: float) -> None:
    if not math.isfinite(value):
        raise UserError(f"{key}={value}: must be a finite number")
