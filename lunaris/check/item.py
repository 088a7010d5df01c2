"""One line of what `lunaris check` found. No torch."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from math import isfinite
from typing import Any

from lunaris.console import fitted

OK, FAIL, SKIP = "ok", "fail", "skip"


@dataclass(frozen=True)
class Item:
    """What was looked at, whether it is well, in words and in figures.

    state: OK, FAIL or SKIP, with the reason in `text`. figures: by name with their unit, for
    machines. advice: overrides or commands that would make the run better, each with its reason.
    """

    name: str
    state: str
    text: str
    figures: dict[str, Any] = field(default_factory=dict)
    advice: tuple[str, ...] = ()

    def line(self) -> str:
        """Return the item as it is printed."""
        return fitted(f"{self.state:<5} {self.name:<12} {self.text}")

    def as_dict(self) -> dict[str, Any]:
        """Return the item for JSON."""
        return asdict(self) | {"figures": {k: _finite(v) for k, v in self.figures.items()}}

    @classmethod
    def from_dict(cls, found: dict[str, Any]) -> Item:
        """Return the item that `as_dict` gave."""
        return cls(**{**found, "advice": tuple(found["advice"])})


def _finite(value: Any) -> Any:
    """Return a figure as JSON can hold it: null for one that is not finite."""
    return None if isinstance(value, float) and not isfinite(value) else value


def skipped(name: str, why: str) -> Item:
    """Return an item that could not be looked at here."""
    return Item(name, SKIP, why)
